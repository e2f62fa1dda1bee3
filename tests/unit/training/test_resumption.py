"""Which checkpoint a run goes on from, and what becomes of the files it replaces."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from spg.core.errors import RunError
from spg.training import resumption
from spg.training.callbacks import Checkpoints
from spg.training.module import Training


def test_without_a_usable_checkpoint_among_those_there_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    assert resumption.find_checkpoint(None, tmp_path) is None, "nothing was saved"
    (tmp_path / "replaced.ckpt").write_bytes(b"an older one")
    with pytest.raises(RunError, match=r"has no last\.ckpt; no other whole checkpoint is there"):
        resumption.find_checkpoint(None, tmp_path)


def test_what_a_run_goes_back_to_stays_under_its_name(tmp_path: Path) -> None:
    last, replaced = tmp_path / "last.ckpt", tmp_path / "replaced.ckpt"
    last.write_text("new")
    replaced.write_text("old")
    resumption._replace(last, replaced, replaced)
    assert (last.read_text(), replaced.read_text()) == ("old", "old")
    assert (tmp_path / "replaced-2.ckpt").read_text() == "new"


def test_a_checkpoint_is_written_early_if_all_processes_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when one is asked to: writing is work of all, and the others may not know of the signal yet."""
    saved = []
    monkeypatch.setattr(Checkpoints, "_save", lambda self, trainer, name: saved.append(name))
    checkpoints = Checkpoints(100, tmp_path, MagicMock(best=None))
    trainer, module = MagicMock(should_stop=False), MagicMock(spec=Training, updates=4, max_updates=8)
    checkpoints.on_train_batch_end(trainer, module, None, None, 0)
    assert saved == []
    trainer.should_stop = True
    checkpoints.on_train_batch_end(trainer, module, None, None, 0)
    assert saved == ["last.ckpt"]
