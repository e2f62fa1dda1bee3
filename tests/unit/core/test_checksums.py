"""Checksums beside files: what a kill at any moment leaves, and what one flipped byte does."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch

from spg.core import checksums, files
from spg.core.checksums import (
    SummingWriter,
    is_whole,
    put_in_place_with_sum,
    sum_file,
    sums_beside,
    write_manifest,
)


def put(path: Path, text: str) -> None:
    """Write `text` to `path` with its checksum."""
    staged = path.with_name("staged")
    writer = SummingWriter(staged)
    writer.write(text.encode())
    put_in_place_with_sum(staged, path, writer.close())


class KilledError(BaseException):
    """Stands for the end of the process."""


def test_the_checksum_is_that_of_the_shell(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    staged = tmp_path / "last.ckpt.tmp"
    writer = SummingWriter(staged)
    torch.save({"x": torch.arange(100_000)}, writer)
    digest = writer.close()
    put_in_place_with_sum(staged, path, digest)
    assert digest == sum_file(path)
    assert torch.equal(torch.load(path)["x"], torch.arange(100_000))
    line = ["sha256sum", "-c", "last.ckpt.sha256"]
    assert subprocess.run(line, cwd=tmp_path, check=True, capture_output=True).stdout == b"last.ckpt: OK\n"


def test_one_flipped_byte_shows_and_a_copy_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    assert is_whole(path) is None
    put(path, "weights")
    assert is_whole(path)
    put(tmp_path / "update-000004.ckpt", "earlier")
    path.write_text("earlier")
    assert is_whole(path), "copied by hand from the other file"
    path.write_text("weightt")
    assert is_whole(path) is False
    (tmp_path / "last.ckpt.sha256").write_bytes(bytes(40))
    assert is_whole(path) is None, "a checksum that can't be read says nothing"


@pytest.mark.parametrize("old", [None, "with", "without"])
def test_killed_at_any_moment_the_file_is_not_taken_for_a_broken_one(
    tmp_path: Path, old: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each renaming, again and again; `old`: whether there is a file, and its checksum."""
    replace = os.replace
    for moment in itertools.count():
        path = tmp_path / f"{old}-{moment}.ckpt"
        if old == "with":
            put(path, "old")
        elif old == "without":
            path.write_text("old")
        left = [moment]

        def kill_or_rename(source: Path, target: Path, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", kill_or_rename)
            try:
                put(path, "new")
            except KilledError:
                assert not path.exists() or is_whole(path) is not False, moment
            else:
                break
        put(path, "newer")  # as the run does that goes on
        assert is_whole(path)
        assert len(sums_beside(path)) == 1
    assert moment >= 2
    assert path.read_text() == "new"
    assert is_whole(path)


def test_an_error_of_the_disk_is_raised_at_the_end() -> None:
    writer = SummingWriter(Path("/dev/full"))
    torch.save(torch.zeros(100_000), writer)
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_a_folder_is_whole_if_all_its_files_are(tmp_path: Path) -> None:
    assert is_whole(tmp_path) is None
    for name in ("0.distcp", "1.distcp"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, {name: sum_file(tmp_path / name) for name in ("1.distcp", "0.distcp")})
    assert is_whole(tmp_path)
    line = ["sha256sum", "--quiet", "-c", checksums.MANIFEST]
    subprocess.run(line, cwd=tmp_path, check=True)
    (tmp_path / "1.distcp").unlink()
    assert is_whole(tmp_path) is False
