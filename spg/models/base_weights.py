"""Base weights of small models: the file name of a combination of settings, and where the file lies.

The weights depend on model, task and pretraining settings. A fingerprint of these is part of the file
name. Files are looked for in the package, then in the cache; `spg.training.pretraining` makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spg.config import ConfigError

# settings that a message names
NAMED = 3
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
    return next((path for path in _places(cfg) if path.is_file()), None)


def _places(cfg: DictConfig) -> list[Path]:
    return [folder / file_name(cfg) for folder in (ASSETS, cache_dir())]


def announce(cfg: DictConfig) -> str | None:
    """Return what will be made because a configuration's base weights are missing; None if nothing is.

    The line names the settings in which the nearest weights that are there differ.
    """
    if cfg.model.get("weights") != "base" or any(path.is_file() for path in _places(cfg)):
        return None
    numbers = cfg.pretrain
    text = (
        f"Note: there are no base weights for these settings. They are made first, by {numbers.steps} "
        f"supervised updates of {numbers.batch_size} completions, and kept in {cache_dir()}."
    )
    near = min(_differences(cfg), key=len, default=None)
    if near is not None and len(near) <= NAMED:
        listed = ", ".join(f"{key}={theirs} (not {ours})" for key, (theirs, ours) in near.items())
        text += f" With {listed} there would be weights already."
    return f"{text} With model.weights=random, or a safetensors file, none are made."


def _differences(cfg: DictConfig) -> list[dict[str, tuple[Any, Any]]]:
    """Return for all base weights of a configuration's task and network the settings that differ.

    Each is a pair of their value and that of `cfg`, by its key.
    """
    ours = _flatten(fingerprint_settings(cfg))
    found = []
    for path in (
        path for folder in (ASSETS, cache_dir()) for path in sorted(folder.glob("base-*.safetensors"))
    ):
        theirs = _flatten(_read_settings(path))
        same = (
            theirs.get(key) == ours[key] for key in ("task._target_", "model.network._target_", "version")
        )
        if all(same):
            keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            found.append({key: (theirs.get(key), ours.get(key)) for key in keys})
    return found


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = (
            _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
        flat |= inner
    return flat


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a file of base weights was made with, {} if it does not say them.

    They stand in the header of a safetensors file, a length of 8 bytes and JSON, which needs no torch.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        settings: dict[str, Any] = json.loads(header["__metadata__"]["spg"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return {}
    return settings


def existing(cfg: DictConfig) -> Path:
    """Return the file of a configuration's base weights, shipped or cached.

    Raises:
        ConfigError: if there is none.
    """
    path = look_up(cfg)
    if path is None:
        raise ConfigError(
            f"there are no base weights for this combination of model and task ({file_name(cfg)}); make them "
            "with `python -m spg.pretrain` and the same settings, or give model.weights=random"
        )
    return path
