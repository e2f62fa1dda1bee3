"""Tables inside a Markdown page, filled from the files that `python -m spg.figures` writes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from spg.config import ConfigError
from spg.core.files import write_text

_TABLE = re.compile(r"(<!-- table:(?P<name>[\w.-]+) -->\n).*?(<!-- /table:(?P=name) -->)", re.DOTALL)
_START = re.compile(r"<!-- table:([\w.-]+) -->")


def fill_page(path: Path) -> list[str]:
    """Fill each `<!-- table:NAME -->` pair of a page from NAME/table.md beside it; return the names.

    Raises:
        ConfigError: if the page, the end of a pair or a table is missing. The page is then not changed.
    """
    if not path.is_file():
        raise ConfigError(f"page={path} is not a file; give a Markdown page, such as results/README.md")
    text = path.read_text(encoding="utf-8")
    names = [match["name"] for match in _TABLE.finditer(text)]
    if not names or names != _START.findall(text):
        lost = ", ".join(name for name in _START.findall(text) if name not in names)
        raise ConfigError(
            f"page={path}: {f'table:{lost} has no end' if lost else 'no table is marked'}; mark each "
            "table by two lines of their own, <!-- table:NAME --> and <!-- /table:NAME -->"
        )
    for name in names:
        if not (path.parent / name / "table.md").is_file():
            raise ConfigError(
                f"page={path}: table:{name} needs {path.parent / name / 'table.md'}; make it with "
                f"python -m spg.figures sweep=<its directory> {shlex.quote(f'output={path.parent / name}')}"
            )

    def fill(match: re.Match[str]) -> str:
        table = (path.parent / match["name"] / "table.md").read_text(encoding="utf-8")
        return f"{match[1]}\n{table}\n{match[3]}"

    write_text(path, _TABLE.sub(fill, text))
    return names
