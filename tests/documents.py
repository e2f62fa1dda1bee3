"""What the tests read in the README and the documentation: pages, commands, and files that a page shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```", flags=re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(python -m spg\.[^`]*)`")
TITLE = re.compile(r'title="([^"]+)"')

README = ROOT / "README.md"
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        README,
        ROOT / "CONTRIBUTING.md",
        ROOT / "sweeps" / "README.md",
        ROOT / "results" / "README.md",
        ROOT / "results" / "methods.md",
    ]
)


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    line: str
    page: Path

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.line}"


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return what stands behind the fence, and the text, of each code block of a page."""
    return [(match["info"].strip(), match["text"]) for match in BLOCK.finditer(page.read_text())]


def lines(page: Path, start: str) -> list[str]:
    """Return the lines of a page's code blocks that begin with `start`."""
    return [line for _, text in blocks(page) for line in text.splitlines() if line.startswith(start)]


def files(page: Path) -> dict[str, str]:
    """Return the files that a page shows, {path: text}: code blocks with a title."""
    found = ((TITLE.search(info), text) for info, text in blocks(page))
    return {title[1]: text for title, text in found if title is not None}


def commands(inline: bool) -> list[Command]:
    """Return the commands in code blocks of all pages, each once; with `inline` also those within lines."""
    found: dict[str, Command] = {}
    for page in PAGES:
        written = lines(page, "python -m spg.")
        if inline:
            prose = BLOCK.sub("", page.read_text())
            written += [" ".join(match.split()) for match in INLINE.findall(prose)]
        for line in written:
            found.setdefault(line, Command(line, page))
    return list(found.values())


def lay_out(page: Path, folder: Path) -> None:
    """Write the files that a page shows to `folder`, beside the folders that commands name."""
    for name, text in files(page).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # pages show one part each in a module of the same name
        before = path.read_text() if path.exists() else ""
        path.write_text(before + text)
    for name in ("sweeps", "results"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
