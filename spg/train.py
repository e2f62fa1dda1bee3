"""`python -m spg.train`: reinforcement learning of a masked diffusion language model.

`--help` lists what can be set, group by group.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from spg import config

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Train as configured and leave a run directory with weights, metrics, curve and summary."""
    started = time.perf_counter()
    config.check(cfg)
    from spg.training import train

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    for line in config.notes(cfg, list(hydra_cfg.overrides.task)):
        log.warning(line)
    train(cfg, folder, started)


if __name__ == "__main__":
    config.run("config", job)
