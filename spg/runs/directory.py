"""The directory of a run: its configuration, and its log."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.config import ConfigError
from spg.core.files import write_text

# what an evaluation or an export needs to know of a run
_PARTS = ("gen_length", "block_size", "decoding", "task", "model", "pretrain")


def holds_run(folder: Path) -> bool:
    """Return whether `folder` holds a training run, or a configuration that is not one of an evaluation."""
    if any((folder / name).exists() for name in ("metrics.csv", "checkpoints", "weights.safetensors")):
        return True
    path = folder / "config.yaml"
    return path.exists() and "generations" not in (config.load_saved(path) or ())


def read_config(folder: Path) -> DictConfig:
    """Return the configuration of the run in `folder`, with the names that classes have now.

    Raises:
        ConfigError: if its config.yaml is not one of a run.
    """
    cfg = config.load_saved(folder / "config.yaml")
    if cfg is None or "trainer" not in cfg:
        raise ConfigError(
            f"{folder / 'config.yaml'} is not the configuration of a run; give the directory that "
            "`python -m spg.train` printed at its end"
        )
    return cfg


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write a configuration, resolved, to `<folder>/config.yaml`, completely or not at all."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def read_updated_config(path: str) -> DictConfig:
    """Return the configuration of the run in the directory `path` as this version would have written it.

    Settings that the version of the run did not have yet get their defaults.

    Raises:
        ConfigError: if there is no run, or if one of its settings does not exist any more.
    """
    cfg = config.load_saved(Path(path) / "config.yaml")
    if cfg is None or "trainer" not in cfg:
        raise ConfigError(
            f"run={path} is not the directory of a run: it has no config.yaml of one; give the directory "
            "that `python -m spg.train` printed at its end"
        )
    other = f"run={path} is of another version of this project"
    remedy = "evaluate it with that version, which its summary.json names (git_commit)"
    missing = [key for key in _PARTS if key not in cfg]
    if missing:
        raise ConfigError(f"{other}: its config.yaml has no {', '.join(missing)}; {remedy}")
    if cfg.task.get("reward") == "cells":  # the name until 0.2
        cfg.task.reward = "released"
    if "precision" not in cfg.model and "precision" in cfg.trainer:  # the place until 0.3
        cfg.model.precision = cfg.trainer.precision
    for part in ("task", "model"):
        option = config.shipped_option(part, cfg[part])
        if option is None:  # not a shipped one, but the user's own
            continue
        unknown = [f"{part}.{key}" for key in cfg[part] if key not in option[1]]
        if unknown:
            raise ConfigError(f"{other}: there is no setting {', '.join(unknown)} any more; {remedy}")
        for key in option[1]:
            if key not in cfg[part]:
                cfg[part][key] = option[1][key]
    try:
        config.check(OmegaConf.create({key: cfg[key] for key in _PARTS}))
    except ConfigError as error:
        raise ConfigError(f"{other}: {error}; {remedy}") from error
    return cfg


def log_to(file: Path) -> None:
    """Append log lines to `file` too, as Hydra does for a run that starts."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
