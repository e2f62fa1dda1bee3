"""The state of a run: its status.json, and the lock of its directory."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spg.core.errors import InputError, Interrupted, RunError
from spg.core.files import DISK_FULL, write_json

STATES = ("running", "finished", "failed", "interrupted")


class InUseError(RunError):
    """Another process works in the directory of a run."""


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status of the run in `folder`, {} if there is none."""
    path = folder / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_status(folder: Path, **changes: Any) -> None:
    """Change entries of `<folder>/status.json`; `state` is one of STATES."""
    write_json(folder / "status.json", {**read_status(folder), **changes})


@contextmanager
def record_failure(folder: Path) -> Iterator[None]:
    """Write to the status of `folder` that a `with` block failed or was interrupted, if it does.

    The error is raised again. A finished run stays finished: the block failed before it changed anything.
    """
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        if read_status(folder).get("state") != "finished":
            text = (str(error) or type(error).__name__).splitlines()[0]
            write_status(folder, state="interrupted" if stopped else "failed", error=text)
        raise


def record_death(folder: Path, text: str) -> bool:
    """Write that the run in `folder` failed, if the first process, which would do it, is gone.

    Returns:
        Whether this process wrote it. Of several that try, one does.
    """
    try:
        with lock(folder):
            if read_status(folder).get("state") != "running":
                return False
            write_status(folder, state="failed", error=text)
    except (RunError, InputError, OSError):
        return False
    return True


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the directory of a run for the time of a `with` block, and make it if it does not exist.

    The lock ends with the process, however that ends.

    Raises:
        InUseError: if another process has locked it.
        InputError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"{folder} can't be written to ({error}); give a directory that can be") from error
    with handle as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUseError(
                f"{folder} is in use: another process works on this run; wait until it ends, or stop it"
            ) from error
        yield
