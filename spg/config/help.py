"""`--help`: what can be set, group by group, read from the configuration files themselves.

The first comment of a file describes it, and a comment behind a key describes the key.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from spg.config.composition import defaults
from spg.config.names import is_known
from spg.config.options import CONF_DIR, files, groups

_KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w]+):(?: (?P<value>.*?))?(?: # (?P<doc>.*))?$")


def describe(path: Path) -> str:
    """Return the first comment of a configuration file that is not a directive, "" if it has none."""
    comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return next((line for line in comments if not line.startswith("@")), "")


def documented_keys(path: Path) -> list[tuple[str, str, str]]:
    """Return (dotted key, value as written, comment) of the commented keys of a file."""
    found: list[tuple[str, str, str]] = []
    parents: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _KEY.match(line)
        if match is None:
            continue
        parents = [*parents[: len(match["indent"]) // 2], match["key"]]
        if match["doc"]:
            found.append((".".join(parents), match["value"] or "", match["doc"]))
    return found


def show_help(primary: str, own: Path | None = None) -> None:
    """Write the help text of a primary config to standard output.

    Args:
        primary: Name of the command's primary config.
        own: The user's folder of configuration files, whose options are listed too.
    """
    console = Console(highlight=False, soft_wrap=True)
    path = CONF_DIR / f"{primary}.yaml"
    command = "train" if primary == "config" else primary
    chosen, cfg = _choices(path), defaults(primary, own)
    for group, option in list(chosen.items()):  # options have options of their own
        file = CONF_DIR / group.partition("@")[0] / f"{option}.yaml"
        if file.is_file():
            chosen |= {f"{group}/{key}": value for key, value in _choices(file).items()}
    console.print(describe(path))
    console.print(Text(f"\nUsage: python -m spg.{command} [group=option ...] [key=value ...]\n"))
    console.print("Keys", style="bold")
    base = _base(path)
    _rows(console, cfg, [*documented_keys(path), *([] if base is None else documented_keys(base))])
    for group in groups(own):
        selected = {key: option for key, option in chosen.items() if key.partition("@")[0] == group}
        if selected:
            _show_group(console, cfg, group, selected, own)
    console.print("\nOptions of Hydra (--multirun, --cfg job, ...): --hydra-help")


def _show_group(
    console: Console, cfg: DictConfig, group: str, selected: dict[str, str | None], own: Path | None
) -> None:
    """Write a group's title, its options, and the keys of the option that is chosen by default."""
    title = ", ".join(f"{key}={option or 'null'}" for key, option in selected.items())
    console.print(f"\n{title}", style="bold")
    options = {file.stem: file for file in files(group, own)}
    for name, file in options.items():
        console.print(Text(f"  {name:<27} {describe(file)}".rstrip()))
    option = next(iter(selected.values()))
    if option in options:
        file = options[option]
        prefix = "" if "@package _global_" in file.read_text(encoding="utf-8") else f"{group}."
        _rows(console, cfg, [(prefix + key, value, doc) for key, value, doc in documented_keys(file)])


def _choices(path: Path) -> dict[str, str | None]:
    """Return the options that a file's defaults list chooses, by their groups."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", [])
    base = _base(path)
    return ({} if base is None else _choices(base)) | {
        key.removeprefix("optional "): option
        for entry in entries
        if isinstance(entry, dict)
        for key, option in entry.items()
    }


def _base(path: Path) -> Path | None:
    """Return the primary config that a primary config builds on, if there is one."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", [])
    names = [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]
    file = path.with_name(f"{names[0]}.yaml") if names else path
    return file if path.parent == CONF_DIR and file != path and file.is_file() else None


def _rows(console: Console, cfg: DictConfig, rows: list[tuple[str, str, str]]) -> None:
    for key, written, doc in rows:
        # a value that follows other settings is shown as it comes out
        value = OmegaConf.select(cfg, key) if "${" in written and is_known(cfg, key) else written
        console.print(Text(f"    {f'{key}={value}':<52} {doc}"))
