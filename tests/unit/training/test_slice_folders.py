"""Which folders of slices stay: at every moment those that a checkpoint names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spg.training.slice_folders import remove_unnamed, unused_name


def save(path: Path, slices: str | None) -> None:
    """Write the file of a checkpoint that names a folder, and make the folder."""
    checkpoint = {"spg": {"updates": 4}, "state_dict": {}}
    torch.save(checkpoint | ({} if slices is None else {"slices": slices}), path)
    if slices is not None:
        (path.parent / slices).mkdir(exist_ok=True)


def folders(folder: Path) -> list[str]:
    """Return the names of the folders."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_folders_that_a_checkpoint_names_stay(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", "update-000004-1.slices")
    save(tmp_path / "best.ckpt", "update-000004-1.slices")
    save(tmp_path / "replaced.ckpt", "update-000004-2.slices")
    save(tmp_path / "update-000002.ckpt", None)
    for name in ("update-000002-1.slices", "update-000006-1.slices", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "update-000002-1.slices" / "__0_0.distcp").touch()
    remove_unnamed(tmp_path)
    assert folders(tmp_path) == ["samples", "update-000004-1.slices", "update-000004-2.slices"]


def test_a_broken_file_names_none_and_a_disk_that_fails_removes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "last.ckpt", "update-000004-1.slices")
    (tmp_path / "update-000002-1.slices").mkdir()
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")

    def fail(*rest: object, **more: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        remove_unnamed(tmp_path)
    assert folders(tmp_path) == ["update-000002-1.slices", "update-000004-1.slices"]
    remove_unnamed(tmp_path)
    assert folders(tmp_path) == ["update-000004-1.slices"]


def test_no_folder_is_written_twice(tmp_path: Path) -> None:
    assert unused_name(tmp_path, 4) == "update-000004-1.slices"
    (tmp_path / "update-000004-1.slices").mkdir()
    assert unused_name(tmp_path, 4) == "update-000004-2.slices"
