"""Files that are written completely or not at all, also if the power fails; and small text files."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# how JSON writes one half of a surrogate pair, with the backslash
_HALF = re.compile(r"\\u[dD][89a-fA-F]")

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def digest(content: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, as written."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def parse_json(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: if it is not JSON, or if a text in it can't be written as UTF-8: JSON can name one half of
            a surrogate pair, which does not encode a character.
    """
    value = json.loads(text)
    if _HALF.search(text):
        check_text(value)
    return value


def check_text(value: Any) -> None:
    """Raise ValueError if a text in a JSON value holds one half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        around = error.object[max(0, error.start - 20) : error.start].encode("utf-8", "backslashreplace")
        raise ValueError(
            f"{half!r} behind {around.decode()!r} is one half of a surrogate pair, which does not encode a "
            "character; write the character whole, or leave it out"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON to `path`, completely or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name and rename it, so that no reader sees half of it."""
    staged = path.with_name(f"{path.name}.tmp")
    try:
        with staged.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        put_in_place(staged, path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # that of a full disk names no file
    return path


def put_in_place(staged: Path, path: Path) -> None:
    """Rename a file that was written to `staged` to `path`.

    What was written is on the disk first: without that, a file can be empty or hold zeros after a power
    failure, although it was renamed.
    """
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names of the files in `folder` be on the disk; some file systems can't, and are left as is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
