"""Paths on the command line, which may hold characters that mean something else to Hydra.

Hydra reads `run=/a=b` as a mistake and `run=/a,b` as two values, unless the value stands in quotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

# keys whose value is one path
PATHS = (
    "run",
    "adapter",
    "checkpoint",
    "generations",
    "output",
    "file",
    "sweep",
    "page",
    "task.path",
    "task.train_path",
    "task.prompt_file",
    "preferences.path",
    "model.path",
    "model.weights",
    "hydra.run.dir",
    "hydra.sweep.dir",
)


def quote_paths(argv: Sequence[str]) -> list[str]:
    """Return a command line with quotes around the paths that Hydra would read as something else.

    A path is quoted if Hydra can't read it, or would read a number in it. One that Hydra would read as
    several values is quoted only if it exists as a whole.
    """
    parser = OverridesParser.create()
    found = []
    for line in argv:
        key, equals, value = line.partition("=")
        if equals and value and key.lstrip("+") in PATHS and _is_misread(parser, line, value):
            line = f"{key}={quote(value)}"
        found.append(line)
    return found


def _is_misread(parser: OverridesParser, line: str, value: str) -> bool:
    if unquote(value) != value:
        return False
    try:
        override = parser.parse_override(line)
    except HydraException:
        return True
    if override.is_sweep_override():
        return Path(value).exists()
    read = override.value()
    return not isinstance(read, str | QuotedString | None) and (
        isinstance(read, int | float) or Path(value).exists()
    )


def quote(value: str) -> str:
    """Return a text in quotes, as Hydra reads it."""
    inner = value.replace("'", r"\'")
    return f"'{inner}'"


def unquote(value: str) -> str:
    """Return a text without the quotes that Hydra needs around some paths."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace(rf"\{value[0]}", value[0])
    return value
