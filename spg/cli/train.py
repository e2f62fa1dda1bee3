"""`python -m spg.train`: reinforcement learning of a masked diffusion language model.

`--help` lists what can be set, group by group.
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from spg import config
from spg.cli import launch
from spg.runs import directory as runs


def job(cfg: DictConfig) -> None:
    """Train as configured and leave a run directory with weights, metrics, curve and summary."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        runs.sweep_job(cfg, folder, overrides, launch.swept_values(cfg))
    else:
        config.check(cfg)
        runs.start(cfg, folder, overrides)


def main() -> None:
    """Run the command."""
    launch.run("config", job, runs.resume)
