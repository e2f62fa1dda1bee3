"""Configurations that lie in files: those of runs and evaluations, and the shipped options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from spg.config import renames
from spg.config.options import files, folder_of_user


def load_saved(path: Path) -> DictConfig | None:
    """Return the configuration that a run or an evaluation left at `path`, or None if there is none.

    Classes that an older version named by another path have their present one.
    """
    try:
        cfg = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError):
        return None
    return renames.update_paths(cfg) if isinstance(cfg, DictConfig) else None


def shipped_option(group: str, node: Any, own: Path | None = None) -> tuple[str, DictConfig] | None:
    """Return name and settings of the option of a group that has the classes of `node`, or None.

    Args:
        group: `model`, or a group whose options have one class, as `task`.
        node: What a configuration holds for that group.
        own: A folder of the user's, whose options count too.
    """
    found: list[tuple[str, DictConfig]] = []
    keys_of = ("network._target_", "tokenizer._target_") if group == "model" else ("_target_",)
    for path in files(group, own):
        option = _read_option(path, path.stat().st_mtime_ns).copy()
        option = option.get("task", option) if group == "task" else option
        classes = [OmegaConf.select(option, key) for key in keys_of]
        if OmegaConf.is_config(node) and classes == [OmegaConf.select(node, key) for key in keys_of]:
            option.pop("defaults", None)
            found.append((path.stem, option))
    # several models have the same classes and differ in where their weights are
    same = [pair for pair in found if pair[1].get("path") == node.get("path")]
    return next(iter(same + found), None)


@lru_cache(maxsize=256)
def _read_option(path: Path, changed: int) -> DictConfig:
    """Return an option as its file stands; `changed` is when the file last changed."""
    return load_saved(path) or OmegaConf.create()


def task_of_run(argv: Sequence[str]) -> str | None:
    """Return `task=...` for the runs that `run=` names; None if one is chosen, or the runs differ."""
    given = dict(line.lstrip("+").partition("=")[::2] for line in argv if not line.startswith("-"))
    if "task" in given or not given.get("run"):
        return None
    found, own = set(), folder_of_user(argv)
    for run in given["run"].split(","):
        cfg = load_saved(Path(run.strip("'\"")) / "config.yaml")
        option = None if cfg is None else shipped_option("task", cfg.get("task"), own)
        found.add(option and option[0])
    name = found.pop() if len(found) == 1 else None
    return None if name is None else f"task={name}"


def make_paths_absolute(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with absolute local paths, so that a run can go on from another directory.

    These are a folder of published weights (model.path) and a file of preference pairs (preferences.path).
    """
    if cfg.get("preferences") is not None:
        cfg = cfg.copy()
        cfg.preferences.path = str(Path(cfg.preferences.path).absolute())
    path = None if "model" not in cfg else cfg.model.get("path")
    if path is not None and Path(path).is_dir():
        cfg = cfg.copy()
        cfg.model.path = str(Path(path).absolute())
    return cfg
