"""Completing a configuration from what lies on this machine."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from spg.config.checks import check
from spg.config.errors import ConfigError
from spg.core.errors import InputError
from spg.models.hub import CONFIG, config_fields, sizes

log = logging.getLogger(__name__)


def settle(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with the sizes that the config.json of a local folder of published weights gives.

    The folder and a file of preference pairs become absolute paths, so that a run goes on from another
    directory, too. Raises ConfigError where the folder is of another kind of model; what is not local is
    looked at when it is loaded.
    """
    if cfg.get("preferences") is not None:
        cfg = cfg.copy()
        cfg.preferences.path = str(Path(cfg.preferences.path).absolute())
    path = None if "model" not in cfg else cfg.model.get("path")
    if path is None or not Path(path).is_dir():
        return cfg
    settled = cfg.copy()
    settled.model.path = str(Path(path).absolute())
    file = Path(path) / CONFIG
    if cfg.model.weights != "published" or not file.is_file():
        return settled
    try:
        found = sizes(cfg.model.network._target_, config_fields(Path(path)), file)
    except InputError as error:
        raise ConfigError(str(error)) from error
    own = settled.model.network.config
    other = {name: value for name, value in found.items() if own[name] != value}
    if other:
        words = ", ".join(f"{name}={value} (not {own[name]})" for name, value in other.items())
        log.info("Sizes of the model from %s: %s", file, words)
    for name, value in other.items():
        own[name] = value
    check(settled)
    return settled
