"""Small text files: read as they are, and written completely or not at all."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
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
            a surrogate pair, which is no character.
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
            f"{half!r} behind {around.decode()!r} is one half of a surrogate pair, which is no character; "
            "write the character whole, or leave it out"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON to `path`, completely or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name and rename it, so that no reader sees half of it."""
    staged = path.with_name(f"{path.name}.tmp")
    staged.write_text(text, encoding="utf-8", newline="")
    os.replace(staged, path)
    return path
