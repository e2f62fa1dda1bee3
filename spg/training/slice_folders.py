"""The folders beside checkpoints that hold their slices: their names, and when they may go.

A folder has a name of its own for each writing, and a checkpoint's file, which names it, is written when the
folder is whole. So the file that stands there names a whole folder at every moment. Several files may name
one folder.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from spg.models.slices import SLICES
from spg.models.weights import read_file

SUFFIX = ".slices"


def unused_name(folder: Path, update: int) -> str:
    """Return a name that nothing in `folder` has, for the slices of an update."""
    number = 1
    while (folder / f"update-{update:06d}-{number}{SUFFIX}").exists():
        number += 1
    return f"update-{update:06d}-{number}{SUFFIX}"


def remove_unnamed(folder: Path) -> None:
    """Remove the folders of slices that no checkpoint in `folder` names; a file that is broken names none.

    Nothing is removed if a file can't be read for another reason.
    """
    found = [path for path in folder.glob(f"*{SUFFIX}") if path.is_dir()]
    if not found:
        return
    named = set()
    for path in folder.glob("*.ckpt"):
        try:
            named.add(str(read_file(path).get(SLICES)))
        except ValueError as error:
            if isinstance(error.__cause__, OSError):
                return
    for path in found:
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)  # what is left goes the next time
