"""`python -m spg.pretrain`: supervised base weights for a small model, with a model card."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from spg import config
from spg.cli import launch

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Pretrain as configured; write weights and card to `output`, or to the cache."""
    config.check(cfg)
    import torch

    from spg.core.console import take_over_logging
    from spg.models.base_weights import cache_dir
    from spg.training.pretraining import pretrain

    take_over_logging()
    torch.set_num_threads(cfg.threads)
    path = pretrain(cfg, cache_dir() if cfg.output is None else Path(cfg.output))
    log.info("Weights: %s", path)
    log.info("Card: %s", path.with_suffix(".md"))


def main() -> None:
    """Run the command."""
    launch.run("pretrain", job)
