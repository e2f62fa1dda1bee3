"""What a run's directory says about the run: its state, and who is at work in it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spg.core.errors import InputError, RunError
from spg.core.files import DISK_FULL, write_text

STATES = ("running", "finished", "failed", "interrupted")
# in a multirun's directory: which jobs the last command did not touch, and why
LEFT_ALONE = "left-alone.txt"
# in a multirun's directory while it is being stopped: no job starts any more
STOPPING = "stopping"


class InUseError(RunError):
    """Another process is at work on the run."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status of the run in `folder`, {} where there is none."""
    path = folder / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_status(folder: Path, **changes: Any) -> None:
    """Change entries of `<folder>/status.json`; `state` is one of STATES."""
    write_json(folder / "status.json", {**read_status(folder), **changes})


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Hold the run's directory; raises InUseError where another process holds it.

    The lock ends with the process, however it ends. Raises InputError where nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"{folder} can't be written to ({error}); give a directory that can be") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUseError(f"{folder} is in use: another process is at work on this run") from error
        yield
