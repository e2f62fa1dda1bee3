"""Checksums beside files, in the format of `sha256sum`, which tell whether a file is what was written.

The checksum of `last.ckpt` is the line of `last.ckpt.sha256`. A folder that is a checkpoint holds a line for
each of its files in `SHA256SUMS`, so that it is renamed together with its checksums. Both can be checked by
hand: `sha256sum -c last.ckpt.sha256`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from spg.core.files import put_in_place, write_text

SUFFIX = ".sha256"
MANIFEST = "SHA256SUMS"


class SummingWriter:
    """A binary file for writing that computes its checksum meanwhile, in a thread of its own.

    An error of the disk, or an interruption, is kept and raised by `close`: torch.save writes from C++, which
    replaces errors or ends the process. Nothing is written after it.

    Args:
        path: The file; an old one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._sum = hashlib.sha256()
        self._error: BaseException | None = None
        self._parts: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
        self._done = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._add_up, daemon=True)
        self._thread.start()

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes and add them to the checksum; both are done when this returns."""
        if self._error is None:
            self._parts.put(data)
            try:
                self._file.write(data)
            except BaseException as error:  # noqa: BLE001  # raised by `close`
                self._error = error
            finally:
                self._done.acquire()  # the memory behind `data` may be gone after the call
        return len(data)

    def flush(self) -> None:
        """Do nothing: `close` flushes, and can say if that fails."""

    def close(self) -> str:
        """Close the file and return its checksum.

        Raises:
            OSError: if the disk did not take all that was written.
        """
        self._parts.put(None)
        self._thread.join()
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error
        return self._sum.hexdigest()

    def _add_up(self) -> None:
        while (data := self._parts.get()) is not None:
            self._sum.update(data)
            self._done.release()


def sum_file(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_beside(path: Path) -> list[str]:
    """Return the checksums that the file `path` may have, [] if none is known."""
    return [digest for digest, name in _read(path.with_name(path.name + SUFFIX)) if name == path.name]


def put_in_place_with_sum(staged: Path, path: Path, digest: str) -> None:
    """Rename a file that was written to `staged` to `path`, and store its checksum beside it.

    At every moment the checksum beside `path` fits the file that is there, or there is none: between the two
    renames both the old checksum and the new one are allowed.

    Args:
        staged: What was written.
        path: Its name.
        digest: Its checksum.
    """
    before = sums_beside(path)
    if before or not path.exists():  # else the file that is there has no checksum, and this is not its own
        _write(path, [digest, *before])
    put_in_place(staged, path)
    _write(path, [digest])


def is_whole(path: Path) -> bool | None:
    """Return whether a file, or a folder with a manifest, is what was written; None if no checksum is known.

    A file whose checksum is that of another one beside it is whole too: it was copied.
    """
    if path.is_dir():
        listed = _read(path / MANIFEST)
        files = ((path / name, digest) for digest, name in listed)
        return all(file.is_file() and sum_file(file) == digest for file, digest in files) if listed else None
    if not sums_beside(path):
        return None
    known = {digest for file in path.parent.glob(f"*{SUFFIX}") for digest, _ in _read(file)}
    return sum_file(path) in known


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the checksums of the files in `folder`, by their names, into its manifest."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    write_text(folder / MANIFEST, "".join(lines))


def _write(path: Path, digests: list[str]) -> None:
    lines = [f"{digest}  {path.name}\n" for digest in dict.fromkeys(digests)]
    write_text(path.with_name(path.name + SUFFIX), "".join(lines))


def _read(path: Path) -> list[tuple[str, str]]:
    """Return the checksums and names in a file of checksums; lines that are none are left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    parts: list[Any] = [line.split(maxsplit=1) for line in text.splitlines()]
    return [(part[0], part[1].strip()) for part in parts if len(part) == 2 and len(part[0]) == 64]
