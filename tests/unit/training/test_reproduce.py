"""`spg.reproduce` with files that no stopped run left."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from spg.cli.reproduce import check_record
from spg.config import ConfigError
from spg.training.reproduce import read_record


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def write_whole(path: Path) -> Path:
    """Write a file with all that a record has."""
    record = {"what": "loss", "update": 1, "rollout": 0, "config": {}, "weights": {}, "parts": []}
    torch.save(record, path)
    return path


def test_a_folder_and_files_that_are_no_zip_are_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "nonfinite-update-000002.pt").write_text("x")
    with pytest.raises(ConfigError, match=r"is a folder; give .*nonfinite-update-000002\.pt"):
        check_record(tmp_path)
    with pytest.raises(ConfigError, match="is not a file; give the one that the error"):
        check_record(tmp_path / "none.pt")
    contents = {
        "text": b"metrics,1\n",
        "empty": b"",
        "nul": b"\0" * 100,
        "pickle": pickle.dumps(Bomb(tmp_path)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="is not a file that a stopped run left, or not a whole one"):
            check_record(tmp_path / name)
    check_record(write_whole(tmp_path / "whole.pt"))


def test_other_files_of_torch_are_refused_and_nothing_in_them_is_executed(tmp_path: Path) -> None:
    whole = write_whole(tmp_path / "whole.pt")
    assert read_record(whole)["what"] == "loss"
    torch.save({"state_dict": {}, "update": "3"}, tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match="it has no what, update, rollout, config, weights, parts; give"):
        read_record(tmp_path / "last.ckpt")
    mark = tmp_path / "executed"
    torch.save({"what": Bomb(mark)}, tmp_path / "bomb.pt")
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "text.pt").write_text("x")
    for name in ("bomb.pt", "half.pt", "text.pt"):
        with pytest.raises(ConfigError, match=r"stopped run left, or not a whole one \(.*\); give") as caught:
            read_record(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not mark.exists()
