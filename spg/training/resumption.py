"""The checkpoint that a run goes on from, and the files that must agree with it."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spg.core.checksums import is_whole, put_in_place_with_sum, sum_file
from spg.core.errors import RunError
from spg.models.weights import describe_checkpoint
from spg.runs.directory import last_logged
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


def find_checkpoint(given: Path | None, folder: Path) -> Path | None:
    """Return the checkpoint that a run goes on from, None if there is none.

    This is the one that the user gives, else last.ckpt. If last.ckpt is broken, or is not there, it is the
    newest whole one among best.ckpt and those that were kept. Every file in question is read once, to compare
    it with its checksum.

    Args:
        given: The checkpoint that the user gives.
        folder: Folder of the run's checkpoints.

    Raises:
        RunError: if the checkpoint that the user gives is broken, or if all are.
    """
    if given is not None:
        damage = _find_damage(given)
        if damage is not None:
            raise RunError(
                f"{damage}; nothing was changed. Give another checkpoint of the run (resume=<one in "
                f"{given.parent}>)"
            )
        return given
    last = folder / "last.ckpt"
    broken = None
    if last.exists():
        broken = _find_damage(last)
        if broken is None:
            return last
    # one after the last row of metrics.csv belongs to updates that were done before the run went back
    logged = last_logged(folder.parent)
    found = [(update, path) for path in _others(folder) if (update := _update_of(path)) is not None]
    for update, path in sorted(found, reverse=True):
        if update > logged or _find_damage(path) is not None:
            continue
        if broken is not None:
            log.warning("%s; going on from %s, of update %d", broken, path.name, update)
        return path
    if broken is None and any(folder.glob("*.ckpt")):
        broken = f"{folder} has no last.ckpt"
    if broken is not None:
        raise RunError(
            f"{broken}; no other whole checkpoint is there, and nothing was changed. Put a checkpoint of the "
            f"run into {folder}, or start a new run in another directory"
        )
    return None


def _others(folder: Path) -> list[Path]:
    return [path for path in (folder / "best.ckpt", *folder.glob("update-*.ckpt")) if path.exists()]


def _find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is whole."""
    try:
        slices = describe_checkpoint(path).get("slices")
    except ValueError as error:
        return str(error)
    for place in (path, slices):
        if place is not None and is_whole(place) is False:
            return f"{place} is broken: it does not have the checksum that was stored when it was written"
    return None


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
    if known.best is None or (
        best.exists() and _update_of(best) == known.best[0] and is_whole(best) is not False
    ):
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
    if kept_as.resolve() == checkpoint.resolve():  # it is still read from
        kept_as = kept_as.with_stem(f"{kept_as.stem}-2")
    if file.exists():
        kept_as.unlink(missing_ok=True)
        os.link(file, kept_as)
    put_in_place_with_sum(staged, file, sum_file(staged))
