"""The state of a run: its status.json, and the lock of its directory."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spg.core.errors import InputError, Interrupted, RunError
from spg.core.files import DISK_FULL, write_json

log = logging.getLogger(__name__)

STATES = ("running", "finished", "failed", "interrupted")


class InUseError(RunError):
    """Another process works in the directory of a run."""


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status of the run in `folder`, {} if there is none.

    If status.json can't be read, the log says so, and what other files tell takes its place.
    """
    path = folder / "status.json"
    if not path.is_file():
        return {}
    status = _read_object(path)
    if status is None:
        status = _infer_status(folder)
        state = status.get("state", "unknown")
        log.warning("%s can't be read as JSON; by the other files the run's state is: %s", path, state)
    return status


def write_status(folder: Path, **changes: Any) -> None:
    """Change entries of `<folder>/status.json`; `state` is one of STATES."""
    write_json(folder / "status.json", {**read_status(folder), **changes})


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _infer_status(folder: Path) -> dict[str, Any]:
    """Return what the other files of a run tell about its status: summary.json is written at its end."""
    summary = _read_object(folder / "summary.json")
    if summary is None or "updates" not in summary:
        return {}
    return {key: summary[key] for key in ("updates", "unused_knobs") if key in summary} | {
        "state": "finished"
    }


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
            with suppress(OSError):  # of a full disk, say: the error itself is the one to tell
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
