"""Base weights for commands that build a model: found, or made first."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from spg.core.console import take_over_logging
from spg.models import base_weights


def ensure(cfg: DictConfig) -> Path:
    """Return the file of a configuration's base weights; only making them needs Lightning."""
    path = base_weights.look_up(cfg)
    if path is not None:
        return path
    from spg.training.pretraining import ensure_base_weights

    take_over_logging()  # Lightning, imported just now, has set its loggers up anew
    return ensure_base_weights(cfg)
