"""Where numbers come from: versions, the commit of the source tree, and files that may change."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from spg import __version__

# libraries that numbers depend on
LIBRARIES = ("torch", "lightning", "hydra-core", "omegaconf", "transformers", "peft")


def versions() -> dict[str, str]:
    """Return the versions of this project, of Python and of the libraries that numbers depend on."""
    own = {"spg": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in LIBRARIES}


def git_commit() -> str | None:
    """Return the commit of the source tree, with `+` if files have changed since; None outside a checkout."""
    where = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(where), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()


def file_stamp(path: Path) -> list[int]:
    """Return the size and the time of change of a file, or of the largest file in a folder.

    Two equal stamps mean that the file has not changed.
    """
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    about = max((file.stat() for file in files), key=lambda stat: stat.st_size)
    return [about.st_size, about.st_mtime_ns]
