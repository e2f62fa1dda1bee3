"""Pages of the site that are made when it is built, so that they cannot be out of date.

- `reference/configuration.md` from the files in `conf/` and their comments;
- `reference/api/<package>.md` from the modules of each package in `spg/`;
- `results/` from the pages and figures in `results/` and `benchmarks/`;
- `changelog.md` from `CHANGELOG.md`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
# the checkout that holds the pages, whichever one is installed
sys.path.insert(0, str(ROOT))

from spg.config.help import documented_keys  # noqa: E402

CONF = ROOT / "conf"
PACKAGE = ROOT / "spg"

# pages of the repository that are also pages of the site
SHARED = {
    "results/ablations.md": ROOT / "results" / "README.md",
    "results/methods.md": ROOT / "results" / "methods.md",
    "results/benchmarks.md": ROOT / "benchmarks" / "README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the figures of `results/` to the files of the site."""
    from mkdocs.structure.files import File

    made = {
        "reference/configuration.md": configuration(),
        "reference/api/index.md": api_index(),
        **{f"reference/api/{name}.md": api(name) for name in packages()},
        **{page: path.read_text(encoding="utf-8") for page, path in SHARED.items()},
    }
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for figure in sorted((ROOT / "results").rglob("*.png")):
        where = f"results/{figure.relative_to(ROOT / 'results')}"
        files.append(File.generated(config, where, abs_src_path=str(figure)))
    return files


def packages() -> list[str]:
    """Return the names of the packages in `spg/` that hold modules."""
    return sorted(
        path.name
        for path in PACKAGE.iterdir()
        if path.is_dir() and path.name not in ("assets", "__pycache__") and any(path.rglob("*.py"))
    )


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def modules(package: str) -> list[str]:
    """Return the dotted names of a package's public modules."""
    found = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            found.append(".".join(parts))
    return found


def api_index() -> str:
    """Return the page that lists the packages."""
    lines = [
        "# API",
        "",
        "One page for each package. The packages are floors: each one imports only from those below it "
        "([Design](../../design/index.md)).",
        "",
        "| package | what it holds |",
        "| --- | --- |",
    ]
    for name in packages():
        path = PACKAGE / name / "__init__.py"
        lines.append(f"| [`spg.{name}`]({name}.md) | {summary(path) if path.is_file() else ''} |")
    return "\n".join(lines) + "\n"


def api(package: str) -> str:
    """Return the page of a package: its modules, documented from their docstrings.

    What a package takes over from its modules is described with these.
    """
    lines = [f"# spg.{package}", ""]
    for name in modules(package):
        lines.append(f"::: {name}")
        path = ROOT.joinpath(*name.split("."), "__init__.py")
        if path.is_file():
            body = ast.parse(path.read_text(encoding="utf-8")).body
            own = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            public = [name for name in own if not name.startswith("_")]
            lines += ["    options:", f"      members: {public or 'false'}"]
        lines.append("")
    return "\n".join(lines)


def described(path: Path) -> str:
    """Return what the comments at the top of a configuration file say, but for directives."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return " ".join(lines)


def table(path: Path, prefix: str = "") -> list[str]:
    """Return a Markdown table of a file's commented keys; no lines if it has none."""
    rows = documented_keys(path)
    if not rows:
        return []
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, value, comment in rows:
        shown = f"`{_cell(value)}`" if value else ""
        lines.append(f"| `{prefix}{key}` | {shown} | {_cell(comment)} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" in text else text.replace("|", "\\|")


def configuration() -> str:
    """Return the reference of all commands, groups, options and keys."""
    lines = [
        "# Configuration",
        "",
        "This page is made from the files in `conf/` and their comments. "
        "`python -m spg.<command> --help` prints the same. [Train](../guide/train.md#configuration) says how "
        "the files are put together.",
        "",
        "## Commands",
        "",
    ]
    for path in sorted(CONF.glob("*.yaml"), key=lambda path: (path.stem != "config", path.stem)):
        command = "train" if path.stem == "config" else path.stem
        lines += [f"### spg.{command}", "", described(path), "", *table(path)]
        chosen = [
            f"`{group.removeprefix('optional ')}={'null' if option is None else option}`"
            for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", [])
            if isinstance(entry, dict)
            for group, option in entry.items()
            if not group.startswith("override ")
        ]
        if chosen:
            lines += ["Default options of the groups: " + ", ".join(chosen) + ".", ""]
    for folder in sorted(path for path in CONF.rglob("*") if path.is_dir()):
        group = str(folder.relative_to(CONF))
        lines += [f"## {group}", "", "| option | what it is |", "| --- | --- |"]
        files = sorted(folder.glob("*.yaml"))
        lines += [f"| `{group}={path.stem}` | {_cell(described(path))} |" for path in files]
        lines.append("")
        if group.startswith(("experiment", "tuned")):
            continue  # they set keys of other groups
        for path in files:
            at_root = "@package _global_" in path.read_text(encoding="utf-8")
            prefix = "" if at_root else f"{group.replace('/', '.')}."
            rows = table(path, prefix)
            if rows:
                lines += [f"### {group}={path.stem}", "", *rows]
    return "\n".join(lines)
