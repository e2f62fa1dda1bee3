"""`python -m spg.plan hardware=h100 ...`: what a run takes, before it starts."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from spg import config
from spg.cli import launch
from spg.config import ConfigError
from spg.models import hub

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Measure the run on tensors without numbers, and say whether it fits and how long it takes.

    Raises:
        ConfigError: before anything is measured, if the settings contradict each other.
    """
    config.check(cfg)
    if cfg.trainer.strategy == "auto" and cfg.trainer.devices * cfg.trainer.nodes > 1:
        cfg.trainer.strategy = "ddp"
        log.info("Planned with trainer=ddp, which several processes need")
    if cfg.resume is not None:
        raise ConfigError(
            f"resume={cfg.resume}: a plan is of a new run; give the settings of the run instead"
        )
    cfg = hub.settle(cfg)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan fetches nothing
    from spg.config import build
    from spg.core.console import take_over_logging
    from spg.planning.advice import advise
    from spg.planning.plan import make_plan
    from spg.planning.report import show_plan, write_plan

    take_over_logging()
    # recomputed layers ask torch for the autocast of the planned device, which need not be here
    warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
    plan = make_plan(cfg)
    plan = replace(plan, advice=advise(plan, cfg))
    show_plan(plan, cfg, build(cfg.assumptions))
    if cfg.output is not None:
        write_plan(plan, Path(cfg.output))
        log.info("Written: %s", cfg.output)


def main() -> None:
    """Run the command."""
    launch.run("plan", job)
