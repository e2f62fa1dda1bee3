"""The directory of a run: its configuration, and its log."""

from __future__ import annotations

import csv
import logging
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.config import ConfigError
from spg.core.console import log_file
from spg.core.files import read_csv, write_text

log = logging.getLogger(__name__)

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

    If config.yaml is broken, or settings are missing in it, the log says so, and the copy beside the
    checkpoints takes its place. `write_config` mends it.

    Raises:
        ConfigError: if its config.yaml is not one of a run, and there is no copy.
    """
    path = folder / "config.yaml"
    cfg = _load(folder)
    if cfg is None or "trainer" not in cfg:
        if holds_run(folder):
            raise ConfigError(
                f"{path} can't be read as the configuration of this run; put it back, or give the command "
                f"that started the run, with resume=auto hydra.run.dir={folder}"
            )
        raise ConfigError(
            f"{path} is not the configuration of a run; give the directory that `python -m spg.train` "
            "printed at its end"
        )
    return cfg


def find_config(folder: Path) -> DictConfig | None:
    """Return what `read_config` does; None if there is no configuration of a run, or if it can't be read."""
    try:
        return read_config(folder)
    except ConfigError:
        return None


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write a configuration, resolved, to `<folder>/config.yaml`, and to its copy beside checkpoints."""
    text = OmegaConf.to_yaml(cfg, resolve=True)
    for path in (folder / "config.yaml", _copy_of(folder)):
        if path.parent.is_dir() and not _holds(path, text):
            write_text(path, text)


def copy_config(folder: Path) -> None:
    """Write the copy of `<folder>/config.yaml` beside the checkpoints, from which `read_config` mends it."""
    with suppress(FileNotFoundError, UnicodeDecodeError):
        write_text(_copy_of(folder), (folder / "config.yaml").read_text(encoding="utf-8"))


def _load(folder: Path) -> DictConfig | None:
    """Return what config.yaml holds, or its copy if it is broken and the copy is not."""
    path = folder / "config.yaml"
    cfg, copy = config.load_saved(path), config.load_saved(_copy_of(folder))
    if copy is not None and "trainer" in copy and not _has_keys_of(cfg, copy):
        log.warning("%s is broken; its copy %s takes its place", path, _copy_of(folder))
        return copy
    return cfg


def _copy_of(folder: Path) -> Path:
    return folder / "checkpoints" / "config.yaml"


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _has_keys_of(cfg: DictConfig | None, other: DictConfig) -> bool:
    """Return whether a configuration lacks none of the settings of another one; half a file lacks some."""
    return cfg is not None and set(config.keys(other)) <= set(config.keys(cfg))


def read_updated_config(path: str) -> DictConfig:
    """Return the configuration of the run in the directory `path` as this version would have written it.

    Settings that the version of the run did not have yet get their defaults.

    Raises:
        ConfigError: if there is no run, or if one of its settings does not exist any more.
    """
    cfg = _load(Path(path))
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


def last_logged(folder: Path) -> int:
    """Return the last update in the metrics.csv of a run, 0 if there is none, or none can be read."""
    try:
        rows = read_csv(folder / "metrics.csv")
    except (OSError, UnicodeDecodeError, csv.Error):
        return 0
    numbers = [str(row.get("update")) for row in rows]
    return max((int(number) for number in numbers if number.isascii() and number.isdigit()), default=0)


def log_to(file: Path) -> None:
    """Append log lines to `file` too, as Hydra does for a run that starts."""
    root = logging.getLogger()
    root.addHandler(log_file(file))
    root.setLevel(logging.INFO)
