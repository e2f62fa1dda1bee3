"""Small text files: read as they are, and written completely or not at all."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def digest(content: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, as written."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON to `path`, completely or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name and rename it, so that no reader sees half of it."""
    staged = path.with_name(f"{path.name}.tmp")
    staged.write_text(text, encoding="utf-8", newline="")
    os.replace(staged, path)
    return path
