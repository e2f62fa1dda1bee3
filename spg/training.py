"""One training run from its configuration to its summary."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from spg import __version__
from spg.callbacks import (
    MOMENTS,
    BeforeAndAfter,
    Checkpoints,
    Interruption,
    ProgressBar,
    Samples,
    Validation,
)
from spg.config import build
from spg.console import console, take_over_logging
from spg.data import PromptStream
from spg.errors import Interrupted, RunError
from spg.loggers import MetricsCSV, wandb_logger
from spg.memory import keep_freed_memory
from spg.module import NonFiniteError, Optimization, Training
from spg.plots import curve
from spg.pretraining import base_weights, build_policy
from spg.ranks import Ranks, end_with_parent, rank
from spg.runs import identity
from spg.status import read_status, write_json, write_status
from spg.weights import read_checkpoint, save_weights

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "lightning", "hydra-core", "omegaconf", "transformers", "peft")


class Turns:
    """What Lightning iterates over: the rollouts that a module has yet to do."""

    def __init__(self, module: Training) -> None:
        self.module = module

    def __iter__(self) -> Iterator[int]:
        return self.module.turns()


def build_module(cfg: DictConfig) -> Training:
    """Build the module that a configuration describes, with its weights."""
    task = build(cfg.task)
    rollouts = -(-cfg.trainer.max_updates // cfg.mu)
    return Training(
        policy=build_policy(cfg),
        task=task,
        sampler=build(cfg.decoding),
        evaluator=build(cfg.decoding, temperature=0.0),
        advantage=build(cfg.advantage),
        masking=build(cfg.masking),
        objective=build(cfg.algorithm.objective),
        optimization=Optimization(**cfg.optimizer),
        prompts=PromptStream(task.examples("train"), cfg.trainer.prompts_per_rollout, rollouts, cfg.seed),
        mu=cfg.mu,
        group_size=cfg.group_size,
        max_updates=cfg.trainer.max_updates,
        seed=cfg.seed,
        micro_batch_size=cfg.trainer.micro_batch_size,
        eval_batch_size=cfg.trainer.eval_batch_size,
        identity=identity(cfg),
    )


def train(
    cfg: DictConfig,
    folder: Path,
    started: float,
    checkpoint: Path | None = None,
    group: str | None = None,
) -> None:
    """Run the training that `cfg` describes, or go on with it; all that it leaves lies in `folder`.

    started: value of time.perf_counter() when the command began. checkpoint: where to go on from; by
    default from checkpoints/last.ckpt, where there is one. group: the multirun that the run belongs to.
    Raises RunError where the run can't go on, Interrupted where it was asked to stop.
    """
    take_over_logging()
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
        end_with_parent()
    keep_freed_memory()
    torch.set_num_threads(cfg.trainer.threads)
    saved = folder / "checkpoints"
    last = saved / "last.ckpt"
    begin = checkpoint or (last if last.exists() else None)
    log.info("Run: %s", folder)

    def lost(line: str) -> None:
        write_status(folder, state="failed", error=line)
        os.write(2, f"{line}; go on with: python -m spg.train resume={folder}\n".encode())
        os._exit(1)

    try:
        if rank() == 0 and cfg.model.weights == "base":
            base_weights(cfg)  # made now, if need be, and not by each process
        with Ranks(checkpoint or folder, cfg.trainer.devices, lost):
            _fit(cfg, folder, started, begin, group)
    except (RunError, Interrupted) as error:
        if rank() > 0:  # the first process tells
            raise SystemExit(1) from error
        raise told(error, cfg, folder) from error
    except Exception:
        if rank() > 0:
            time.sleep(2.0)  # where the first process died, end_with_parent says so meanwhile
        raise


def told(error: RunError | Interrupted, cfg: DictConfig, folder: Path) -> RunError | Interrupted:
    """Return an error with what to do about it; a number that is none is written to a file to see again."""
    again = f"python -m spg.train resume={folder}"
    if isinstance(error, Interrupted):
        return Interrupted(f"{error}; go on with: {again}")
    if isinstance(error, NonFiniteError):
        path = folder / f"nonfinite-update-{error.record['update']:06d}.pt"
        torch.save({**error.record, "config": OmegaConf.to_container(cfg, resolve=True)}, path)
        see = f"python -m spg.reproduce file={path}"
        return RunError(f"{error}\nNothing was saved after it. See it again with: {see}")
    return RunError(f"{error}\nGo on with: {again}")


def _fit(cfg: DictConfig, folder: Path, started: float, begin: Path | None, group: str | None) -> None:
    """Train from `begin` on, or from the start, and write the results."""
    first = rank() == 0
    loggers: list[Any] = []
    state = None
    if begin is not None:
        try:
            state = read_checkpoint(begin)
        except ValueError as error:
            raise RunError(
                f"{error}; nothing was changed. Give another checkpoint of the run (resume=<one in "
                f"{begin.parent}>), or remove it to begin anew"
            ) from error
    unused = read_status(folder).get("unused_knobs", [])
    module = build_module(cfg)
    module.started = started
    if first:
        metrics = MetricsCSV(folder)
        if state is not None and begin is not None:
            module.on_load_checkpoint(state)  # refused before anything is written
            metrics.cut(module.updates)
            _make_last(begin, folder / "checkpoints" / "last.ckpt")
            log.info("Going on after update %d (%s)", module.updates, begin.name)
        loggers.append(metrics)
        if cfg.logger.wandb is not None:
            settings = OmegaConf.to_container(cfg, resolve=True)
            loggers.append(wandb_logger(**cfg.logger.wandb, folder=folder, config=settings, group=group))
    validation = Validation(cfg.trainer.validate_every)
    tested = BeforeAndAfter(folder / "checkpoints" / "best.ckpt")
    checkpoints = Checkpoints(
        cfg.trainer.checkpoint_every, folder / "checkpoints", validation, cfg.trainer.keep_every
    )
    interruption = Interruption(checkpoints)
    callbacks = [tested, validation, checkpoints, interruption]
    if first:
        callbacks = [ProgressBar(), *callbacks[:3], Samples(cfg.trainer.samples_every), interruption]
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        strategy=cfg.trainer.strategy,
        devices=cfg.trainer.devices,
        precision=cfg.trainer.precision,
        max_epochs=1,
        logger=loggers,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with interruption.listening():
        trainer.fit(module, Turns(module), ckpt_path=begin, weights_only=True)
    if module.updates < module.max_updates:
        raise Interrupted(f"stopped after update {module.updates}, which is saved")
    if not first:
        return
    if module.policy.has_adapter:
        module.policy.save_adapter(folder / "adapter")
    else:
        save_weights(module.policy.network, folder / "weights.safetensors", {"update": str(module.updates)})
    summary = {
        **tested.summary(),
        "validation.before": validation.history[0][1],
        "validation.best": validation.best[1],
        "validation.last": validation.history[-1][1],
        "best.update": validation.best[0],
        "best.checkpoint": str(tested.best),
        "updates": module.updates,
        "rollouts": module.rollouts,
        "parameters": sum(p.numel() for p in module.policy.parameters()),
        "parameters.trained": sum(p.numel() for p in module.trained().values()),
        "seconds": module.elapsed(),
        **{f"seconds.{part}": spent for part, spent in module.seconds.items()},
        "unused_knobs": unused,
        "seed": cfg.seed,
        "threads": cfg.trainer.threads,
        "devices": cfg.trainer.devices,
        "versions": {"spg": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "git_commit": git_commit(),
    }
    write_json(folder / "summary.json", summary)
    title = f"{module.task.name}, {summary['n']} examples a half, seed {cfg.seed}"
    curve(folder, title)
    show_summary(summary, folder)


def _make_last(checkpoint: Path, last: Path) -> None:
    """Make `checkpoint` the one that the run goes on from, and sweep unfinished files away."""
    for stale in last.parent.glob("*.tmp"):
        stale.unlink()
    if checkpoint.resolve() != last.resolve():
        staged = last.with_name("last.ckpt.tmp")
        shutil.copyfile(checkpoint, staged)
        if last.exists():
            os.replace(last, last.with_name("last.ckpt.replaced"))
        os.replace(staged, last)


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
