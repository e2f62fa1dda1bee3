"""One training run from its configuration to its summary."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch.utils.data import DataLoader

from spg import __version__
from spg.callbacks import MOMENTS, BeforeAndAfter, Checkpoints, ProgressBar, Samples, Validation
from spg.config import build, unread_knobs
from spg.console import console, take_over_logging
from spg.data import PromptStream
from spg.figures import curve
from spg.loggers import MetricsCSV, wandb_logger
from spg.memory import keep_freed_memory
from spg.module import Optimization, Training
from spg.pretraining import build_policy
from spg.weights import save_weights

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "lightning", "hydra-core", "omegaconf", "transformers")


def build_module(cfg: DictConfig) -> Training:
    """Build the module that a configuration describes, with its weights."""
    return Training(
        policy=build_policy(cfg),
        task=build(cfg.task),
        sampler=build(cfg.decoding),
        evaluator=build(cfg.decoding, temperature=0.0),
        advantage=build(cfg.advantage),
        masking=build(cfg.masking),
        objective=build(cfg.algorithm.objective),
        optimization=Optimization(**cfg.optimizer),
        mu=cfg.mu,
        group_size=cfg.group_size,
        max_updates=cfg.trainer.max_updates,
        seed=cfg.seed,
        micro_batch_size=cfg.trainer.micro_batch_size,
        eval_batch_size=cfg.trainer.eval_batch_size,
    )


def train(cfg: DictConfig, folder: Path, started: float) -> dict[str, Any]:
    """Run the training that `cfg` describes; return the summary, which also lies in `folder`.

    started: value of time.perf_counter() when the command began.
    """
    take_over_logging()
    unused = unread_knobs(cfg)  # building parts resolves what they refer to
    keep_freed_memory()
    torch.set_num_threads(cfg.trainer.threads)
    log.info("Run: %s", folder)
    module = build_module(cfg)
    loggers: list[Any] = [MetricsCSV(folder)]
    if cfg.logger.wandb is not None:
        loggers.append(wandb_logger(**cfg.logger.wandb, folder=folder, config=OmegaConf.to_container(cfg)))
    validation = Validation(cfg.trainer.validate_every)
    tested = BeforeAndAfter()
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=1,
        precision=cfg.trainer.precision,
        max_epochs=1,
        logger=loggers,
        callbacks=[
            ProgressBar(),
            tested,
            validation,
            Checkpoints(cfg.trainer.checkpoint_every, folder / "checkpoints", validation),
            Samples(cfg.trainer.samples_every),
        ],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stream = PromptStream(
        module.task.examples("train"),
        cfg.trainer.prompts_per_rollout,
        -(-cfg.trainer.max_updates // cfg.mu),
        cfg.seed,
    )
    trainer.fit(module, DataLoader(stream, batch_size=None))
    save_weights(module.policy.network, folder / "weights.safetensors", {"update": str(module.updates)})

    best = folder / "checkpoints" / "best.ckpt"
    summary = {
        **tested.summary(module, best),
        "validation.before": validation.history[0][1],
        "validation.best": validation.best[1],
        "validation.last": validation.history[-1][1],
        "best.update": validation.best[0],
        "best.checkpoint": str(best),
        "updates": module.updates,
        "rollouts": module.rollouts,
        "parameters": sum(p.numel() for p in module.policy.parameters()),
        "seconds": time.perf_counter() - started,
        **{f"seconds.{part}": spent for part, spent in module.seconds.items()},
        "unused_knobs": unused,
        "seed": cfg.seed,
        "threads": cfg.trainer.threads,
        "versions": {"spg": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "git_commit": git_commit(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    title = f"{module.task.name}, {summary['n']} examples a half, seed {cfg.seed}"
    curve(folder, title)
    show_summary(summary, folder)
    return summary


def git_commit() -> str | None:
    """Return the commit of the source tree, with `+` where it is changed; None outside a checkout."""
    where = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(where), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()


def show_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the run's table: the test half before and after, best checkpoint, where the time went."""
    table = Table(title=f"Test half, greedy, n = {summary['n']} (95% bootstrap interval)")
    table.add_column("measure")
    for heading in ("before", "after, best", "after, last"):
        table.add_column(heading, justify="right")
    for name in [key.removesuffix(".before.interval") for key in summary if key.endswith(".before.interval")]:
        row = [name.replace("_", " ")]
        for moment in MOMENTS:
            low, high = summary[f"{name}.{moment}.interval"]
            row.append(f"{summary[f'{name}.{moment}']:.3f}\n({low:.3f} to {high:.3f})")
        table.add_row(*row)
    console.print(table)
    best = f"update {summary['best.update']}, validation accuracy {summary['validation.best']:.3f}"
    log.info("Best checkpoint: %s (checkpoints/best.ckpt)", best)
    parts = ("rollout", "reward", "update", "evaluation")
    log.info(
        "Time: %.0f s; %s",
        summary["seconds"],
        ", ".join(f"{part} {summary[f'seconds.{part}']:.1f} s" for part in parts),
    )
    if summary["unused_knobs"]:
        log.info("Read by no selected part: %s", ", ".join(summary["unused_knobs"]))
    log.info("Run directory: %s (curve.png, metrics.csv, summary.json, weights.safetensors)", folder)
