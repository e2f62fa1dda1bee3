"""The checkpoint that a run goes on from, and the files that must agree with it."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spg.core.errors import RunError
from spg.models.weights import describe_checkpoint
from spg.training.callbacks import Validation
from spg.training.slice_folders import remove_unnamed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run goes on from: its file and its contents.

    Tensors in slices have only a shape there.
    """

    path: Path
    state: dict[str, Any]

    @property
    def update(self) -> int:
        """The number of updates that were done."""
        done: int = self.state["spg"]["updates"]
        return done


def latest_checkpoint(folder: Path) -> Path | None:
    """Return last.ckpt in a folder of checkpoints, else the newest, None if there is none."""
    last = folder / "last.ckpt"
    if last.exists():
        return last
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def read_start(path: Path | None) -> Start | None:
    """Read the checkpoint that a run goes on from, None if it starts from the beginning.

    Raises:
        RunError: if the file is not a checkpoint.
    """
    if path is None:
        return None
    try:
        return Start(path, describe_checkpoint(path))
    except ValueError as error:
        raise RunError(
            f"{error}; nothing was changed. Give another checkpoint of the run (resume=<one in "
            f"{path.parent}>), or remove it to begin anew"
        ) from error


def rewind_files(start: Start, folder: Path, validation: Validation) -> None:
    """Make the checkpoint of `start` the last one in `folder`, and best.ckpt agree with it.

    The files that are replaced are kept as replaced.ckpt and replaced-best.ckpt. At every moment last.ckpt is
    a whole checkpoint. best.ckpt may be of a later update than the checkpoint knows: the run goes back, or it
    was killed between writing two files. Then the best is chosen among this update and later ones.

    Args:
        start: Where the run goes on from.
        folder: Folder of the run's checkpoints.
        validation: Is told from which update on checkpoints exist.
    """
    for stale in folder.glob("*.tmp"):
        stale.unlink()
    _replace(folder / "last.ckpt", start.path, folder / "replaced.ckpt")
    known = Validation(validation.every)
    known.load_state_dict(start.state["callbacks"]["Validation"])
    best = folder / "best.ckpt"
    remove_unnamed(folder)
    if known.best is None or (best.exists() and _update_of(best) == known.best[0]):
        return
    if start.update != known.best[0]:
        log.info("The best checkpoint before this one, of update %d, is no longer there", known.best[0])
        validation.since = start.update
    if start.update in dict(known.history):
        _replace(best, start.path, folder / "replaced-best.ckpt")


def _update_of(path: Path) -> int | None:
    """Return the update of a checkpoint, None if it can't be read."""
    try:
        update: int = describe_checkpoint(path)["spg"]["updates"]
    except ValueError:
        return None
    return update


def _replace(file: Path, checkpoint: Path, kept_as: Path) -> None:
    """Replace a file by a copy of `checkpoint`, whole at every moment; the old file becomes `kept_as`."""
    if checkpoint.resolve() == file.resolve():
        return
    staged = file.with_name(f"{file.name}.tmp")
    shutil.copyfile(checkpoint, staged)
    with staged.open("rb") as copied:
        os.fsync(copied.fileno())
    if file.exists():
        kept_as.unlink(missing_ok=True)
        os.link(file, kept_as)
    os.replace(staged, file)
