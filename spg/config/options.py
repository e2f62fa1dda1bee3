"""Where configuration files lie, and which groups and options there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from spg.config import renames

_PACKAGED = Path(__file__).parent.parent / "conf"
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"

# groups of which no option need be chosen
OPTIONAL = ("experiment", "model/lora", "tuned", "tuned/task", "tuned/method", "preferences")


def folder_of_user(argv: Sequence[str]) -> Path | None:
    """Return the folder of the user's own configuration files that a command line gives (-cd), or None."""
    given = get_args_parser().parse_known_args(list(argv))[0].config_dir
    return None if given is None else Path(given).resolve()


def groups(own: Path | None = None) -> list[str]:
    """Return the names of the config groups, nested ones as `model/lora`.

    Args:
        own: A folder of the user's, whose groups count too.
    """
    found = {str(path.relative_to(CONF_DIR)) for path in CONF_DIR.rglob("*") if path.is_dir()}
    if own is not None and own.is_dir():
        inside = [path for path in own.iterdir() if path.is_dir() and any(path.glob("*.yaml"))]
        found |= {path.name for path in inside if not path.name.startswith((".", "_"))}
    return sorted(found)


def files(group: str, own: Path | None = None) -> list[Path]:
    """Return the files of a group's options by name; one of the user's takes the place of a shipped one."""
    folders = [CONF_DIR, *([] if own is None else [own])]
    found = {path.stem: path for folder in folders for path in (folder / group).glob("*.yaml")}
    return [found[name] for name in sorted(found)]


def group_choices(argv: Sequence[str]) -> list[str]:
    """Write choices as Hydra reads them: an option of a nested group with `/`, none as `~group`."""
    own = folder_of_user(argv)
    found = []
    for line in argv:
        key, equals, value = line.partition("=")
        nested = key.replace(".", "/")
        is_group = any(folder.joinpath(nested).is_dir() for folder in (CONF_DIR, own) if folder is not None)
        if equals and "." in key and is_group and not value.startswith("{"):
            line = f"{nested}={value}"
        if line in [f"{name}=null" for name in OPTIONAL]:
            line = f"~{line.removesuffix('=null')}"
        found.append(line)
    return found


def saved(path: Path) -> DictConfig | None:
    """Return the configuration that a run or an evaluation left at `path`, or None if there is none.

    Classes that an older version named by another path have their present one.
    """
    try:
        cfg = OmegaConf.load(path)
    except (OSError, YAMLError):
        return None
    return renames.updated(cfg) if isinstance(cfg, DictConfig) else None


def shipped(group: str, node: Any) -> tuple[str, DictConfig] | None:
    """Return name and settings of the shipped option of a group that has the classes of `node`, or None."""
    found: list[tuple[str, DictConfig]] = []
    keys_of = ("network._target_", "tokenizer._target_") if group == "model" else ("_target_",)
    for path in files(group):
        option = saved(path) or OmegaConf.create()
        option = option.task if group == "task" else option
        classes = [OmegaConf.select(option, key) for key in keys_of]
        if OmegaConf.is_config(node) and classes == [OmegaConf.select(node, key) for key in keys_of]:
            option.pop("defaults", None)
            found.append((path.stem, option))
    # several models have the same classes and differ in where their weights are
    same = [pair for pair in found if pair[1].get("path") == node.get("path")]
    return next(iter(same + found), None)


def task_of_run(argv: Sequence[str]) -> str | None:
    """Return `task=...` for the runs that `run=` names; None if one is chosen, or the runs differ."""
    given = dict(line.lstrip("+").partition("=")[::2] for line in argv if not line.startswith("-"))
    if "task" in given or not given.get("run"):
        return None
    found = set()
    for run in given["run"].split(","):
        cfg = saved(Path(run.strip("'\"")) / "config.yaml")
        option = None if cfg is None else shipped("task", cfg.get("task"))
        found.add(option and option[0])
    name = found.pop() if len(found) == 1 else None
    return None if name is None else f"task={name}"
