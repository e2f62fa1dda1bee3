"""`python -m spg.evaluate`: decode and measure held-out completions of a run or of the base model."""

from __future__ import annotations

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from spg import config, launch

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Evaluate as configured; write evaluation.json beside the table."""
    config.check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = cfg if cfg.run is None else of_run(cfg, list(HydraConfig.get().overrides.task))
    from spg.scoring import evaluate_models

    evaluate_models(settings, folder)


def of_run(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return `cfg` with the model, task and decoding of the run `cfg.run`, unless overridden.

    Raises ConfigError where the directory holds no run.
    """
    path = Path(cfg.run) / "config.yaml"
    if not path.is_file():
        raise config.ConfigError(
            f"run={cfg.run} is no run's directory: it has no config.yaml; give the directory that "
            "`python -m spg.train` printed at its end"
        )
    trained = OmegaConf.load(path)
    assert isinstance(trained, DictConfig)
    merged = cfg.copy()
    OmegaConf.set_struct(merged, False)
    for key in ("model", "task", "decoding", "pretrain", "block_size", "gen_length"):
        merged[key] = trained[key]
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~").partition("@")[0]
        OmegaConf.update(merged, key, OmegaConf.select(cfg, key))
    config.check(merged)
    return merged


if __name__ == "__main__":
    launch.run("evaluate", job)
