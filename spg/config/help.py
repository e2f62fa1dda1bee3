"""`--help`: what can be set, group by group, read from the configuration files themselves.

The first comment of a file describes it, a comment behind a key describes the key; what the help
says is therefore what stands beside the value.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from spg.config import CONF_DIR, defaults, groups, is_known

_KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w]+):(?: (?P<value>.*?))?(?: # (?P<doc>.*))?$")


def describe(path: Path) -> str:
    """Return the first comment of a configuration file that is no directive."""
    comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    return next(line for line in comments if not line.startswith("@"))


def documented_keys(path: Path) -> list[tuple[str, str, str]]:
    """Return (dotted key, value as written, comment) of the commented keys of a file."""
    found: list[tuple[str, str, str]] = []
    parents: list[str] = []
    for line in path.read_text().splitlines():
        match = _KEY.match(line)
        if match is None:
            continue
        parents = [*parents[: len(match["indent"]) // 2], match["key"]]
        if match["doc"]:
            found.append((".".join(parents), match["value"] or "", match["doc"]))
    return found


def show(primary: str) -> None:
    """Write the help text of a primary config to standard output."""
    console = Console(highlight=False, soft_wrap=True)
    path = CONF_DIR / f"{primary}.yaml"
    command = "train" if primary == "config" else primary
    chosen, cfg = _chosen(path), defaults(primary)
    for group, option in list(chosen.items()):  # options have options of their own
        file = CONF_DIR / group.partition("@")[0] / f"{option}.yaml"
        if file.is_file():
            chosen |= {f"{group}/{key}": value for key, value in _chosen(file).items()}
    console.print(describe(path))
    console.print(Text(f"\nUsage: python -m spg.{command} [group=option ...] [key=value ...]\n"))
    console.print("Keys", style="bold")
    _rows(console, cfg, documented_keys(path))
    for group in groups():
        selected = {key: option for key, option in chosen.items() if key.partition("@")[0] == group}
        if not selected:
            continue
        title = ", ".join(f"{key}={option or 'null'}" for key, option in selected.items())
        console.print(f"\n{title}", style="bold")
        for file in sorted((CONF_DIR / group).glob("*.yaml")):
            console.print(Text(f"  {file.stem:<27} {describe(file)}"))
        option = next(iter(selected.values()))
        if option is not None and "${" not in option:
            file = CONF_DIR / group / f"{option}.yaml"
            prefix = "" if "@package _global_" in file.read_text() else f"{group}."
            _rows(console, cfg, [(prefix + key, value, doc) for key, value, doc in documented_keys(file)])
    console.print("\nOptions of Hydra (--multirun, --cfg job, ...): --hydra-help")


def _chosen(path: Path) -> dict[str, str | None]:
    """Return the options that a file's defaults list chooses, by their groups."""
    return {
        key.removeprefix("optional "): option
        for entry in yaml.safe_load(path.read_text()).get("defaults", [])
        if isinstance(entry, dict)
        for key, option in entry.items()
    }


def _rows(console: Console, cfg: DictConfig, rows: list[tuple[str, str, str]]) -> None:
    for key, written, doc in rows:
        # what follows other settings is told as it comes out
        value = OmegaConf.select(cfg, key) if "${" in written and is_known(cfg, key) else written
        console.print(Text(f"    {f'{key}={value}':<52} {doc}"))
