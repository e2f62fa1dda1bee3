"""Commands of this project, written so that they can be pasted into a shell."""

from __future__ import annotations

import shlex


def command_line(name: str, *arguments: object) -> str:
    """Return the command `python -m spg.<name>` with arguments, which are quoted if the shell needs that."""
    return shlex.join(["python", "-m", f"spg.{name}", *map(str, arguments)])
