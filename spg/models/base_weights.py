"""Base weights of small models: the file name of a combination of settings, and where the file lies.

The weights depend on model, task and pretraining settings. A fingerprint of these is part of the file
name. Files are looked for in the package, then in the cache; `spg.training.pretraining` makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spg.config import ConfigError

# raised when the same settings begin to mean other weights
VERSION = 2
# files that the package brings along
ASSETS = Path(__file__).parent.parent / "assets"
# Settings that the weights do not depend on. They are made on generated examples, whatever file or reward a
# run uses; how weights are kept and computed with came later than the fingerprint.
UNRELATED = {
    "model": (
        "weights",
        "lora",
        "path",
        "revision",
        "prompt_style",
        "dtype",
        "quantization",
        "precision",
        "checkpointing",
        "compile",
    ),
    "task": ("reward", "eval_size", "path", "parser", "prompt_file"),
    "pretrain": (),
}


def fingerprint_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return all that base weights depend on: settings of model, task and pretraining."""
    kept: dict[str, Any] = {"gen_length": cfg.gen_length, "version": VERSION}
    for part, unrelated in UNRELATED.items():
        settings = OmegaConf.to_container(cfg[part], resolve=True)
        assert isinstance(settings, dict)
        kept[part] = {key: value for key, value in settings.items() if key not in unrelated}
    return kept


def file_name(cfg: DictConfig) -> str:
    """Return the file name of a configuration's base weights."""
    text = json.dumps(fingerprint_settings(cfg), sort_keys=True)
    parts = [cfg.task._target_.rpartition(".")[2].lower(), cfg.task.get("format")]
    name = "-".join(part for part in parts if part is not None)
    return f"base-{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def cache_dir() -> Path:
    """Return the folder of weights made here: $SPG_CACHE, or spg below the user's cache folder."""
    if "SPG_CACHE" in os.environ:
        return Path(os.environ["SPG_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spg"


def look_up(cfg: DictConfig) -> Path | None:
    """Return the file of a configuration's base weights, shipped or cached; None if there is none."""
    name = file_name(cfg)
    found = (folder / name for folder in (ASSETS, cache_dir()) if (folder / name).is_file())
    return next(found, None)


def existing(cfg: DictConfig) -> Path:
    """Return the file of a configuration's base weights, shipped or cached.

    Raises:
        ConfigError: if there is none.
    """
    path = look_up(cfg)
    if path is None:
        raise ConfigError(
            f"there are no base weights for this combination of model and task ({file_name(cfg)}); make them "
            "with python -m spg.pretrain and the same settings, or give model.weights=random"
        )
    return path
