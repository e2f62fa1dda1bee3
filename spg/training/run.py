"""One training run from its configuration to its summary."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor

from spg.config import build
from spg.core.console import console, take_over_logging
from spg.core.errors import InputError, Interrupted, RunError
from spg.core.examples import Example
from spg.core.memory import keep_freed_memory
from spg.models.factory import build_policy, check_device, check_reads
from spg.models.weights import read_checkpoint, save_tensors, save_weights
from spg.reports.plots import curve
from spg.rollout.decoder import Decoder
from spg.rollout.prompt_order import PromptStream
from spg.rollout.recorded import Recorded, check_pairs
from spg.runs.directory import git_commit, identity, versions, write_config
from spg.runs.status import read_status, write_json, write_status
from spg.tasks.base import Task
from spg.tasks.preferences import Preferences
from spg.training.callbacks import (
    MOMENTS,
    BeforeAndAfter,
    Checkpoints,
    Interruption,
    ProgressBar,
    Samples,
    Validation,
)
from spg.training.fsdp import Sharded, sharding_of
from spg.training.launching import Ranks, end_with_parent, rank
from spg.training.loggers import MetricsCSV, wandb_logger
from spg.training.module import Training
from spg.training.nonfinite import NonFiniteError
from spg.training.optimizer import Optimization
from spg.training.pretraining import ensure_base_weights

log = logging.getLogger(__name__)

# how long a process waits for the slowest one: its rollouts, programs that judge them, its share of an
# evaluation. Lightning's half hour is too short for billions of parameters, and of a process that has died
# `Ranks` tells within seconds.
PATIENCE = timedelta(hours=4)


class RemainingPrompts:
    """What Lightning iterates over: the prompts of each rollout that a module has yet to do."""

    def __init__(self, module: Training) -> None:
        self.module = module

    def __iter__(self) -> Iterator[list[Example]]:
        return self.module.remaining_prompts()


def load_task(cfg: DictConfig) -> Task:
    """Build the task with its examples; raises InputError where some are missing or can't be read."""
    task: Task = build(cfg.task)
    if cfg.get("preferences") is not None:  # runs of version 0.3 have no such key
        task = build(cfg.preferences, task=task)
    for split in ("train", "validation", "test"):
        if not task.examples(split):
            raise InputError(f"{task.name} has no examples of split {split}; give more held-out rows")
    # pairs have prompts of their own, which are tried when the tokenizer is there
    first = task.examples("train" if not isinstance(task, Preferences) else "validation")[0]
    check_reads(cfg, task.prompt(first), task.name)
    return task


def build_module(cfg: DictConfig, task: Task | None = None) -> Training:
    """Build the module that a configuration describes, with its weights; `task` is what load_task made."""
    task = task or load_task(cfg)
    rollouts = -(-cfg.trainer.max_updates // cfg.mu)
    policy = build_policy(cfg, ensure_base_weights)
    sampler: Decoder = build(cfg.decoding)
    if isinstance(task, Preferences):
        sampler = Recorded(sampler.gen_length)
        check_pairs(policy, sampler, task)
    return Training(
        policy=policy,
        task=task,
        sampler=sampler,
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
        cut_completions=cfg.trainer.get("cut_completions", False),  # not in runs of version 0.3
        eval_batch_size=cfg.trainer.eval_batch_size,
        identity=identity(cfg),
    )


def train(
    cfg: DictConfig,
    folder: Path,
    started: float,
    checkpoint: Path | None = None,
    changes: Sequence[str] = (),
    *,
    group: str | None = None,
) -> bool:
    """Run the training that `cfg` describes, or go on with it; all that it leaves lies in `folder`.

    started: value of time.perf_counter() when the command began. checkpoint: where to go on from; by
    default the last one that the folder holds, if any. changes: overrides, already in `cfg`, that the
    run goes on with from now on. group: the multirun that the run belongs to. Returns whether the user
    asked to stop when nothing was left to stop. Raises RunError where the run can't go on, Interrupted
    where it was asked to stop.
    """
    take_over_logging()
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
        end_with_parent()
    keep_freed_memory()
    torch.set_num_threads(cfg.trainer.threads)
    begin = checkpoint or latest(folder / "checkpoints")
    log.info("Run: %s", folder)

    def lost(line: str) -> None:
        write_status(folder, state="failed", error=line)
        os.write(2, f"{line}; go on with: python -m spg.train resume={folder}\n".encode())
        os._exit(1)

    try:
        check_device(cfg)
        task = load_task(cfg)  # where data are missing, no base weights need be made
        if rank() == 0 and cfg.model.weights == "base":
            ensure_base_weights(cfg)  # made now, if need be, and not by each process
        with Ranks([f"resume={begin or folder}", *changes], cfg.trainer.devices, lost):
            return _fit(cfg, task, folder, started, begin, bool(changes), group)
    except (NonFiniteError, Interrupted) as error:
        if rank() > 0:  # the first process tells
            raise SystemExit(1) from error
        raise told(error, cfg, folder) from error
    except RunError as error:
        raise told(error, cfg, folder) from error
    except RuntimeError:  # as torch.distributed raises where another process is gone
        if rank() > 0:
            time.sleep(3.0)  # if that was the first one, end_with_parent says so meanwhile
        raise
    finally:
        if dist.is_initialized():  # the next run of a multirun makes its own
            dist.destroy_process_group()


def latest(saved: Path) -> Path | None:
    """Return the checkpoint that a run goes on from: last.ckpt, else the newest, None where there is none."""
    last = saved / "last.ckpt"
    if last.exists():
        return last
    return max(saved.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def told(error: RunError | Interrupted, cfg: DictConfig, folder: Path) -> RunError | Interrupted:
    """Return an error with what to do about it; a number that is none is written to a file to see again."""
    again = f"python -m spg.train resume={folder}"
    if isinstance(error, Interrupted):
        return Interrupted(f"{error}; go on with: {again}")
    if isinstance(error, NonFiniteError):
        path = folder / f"nonfinite-update-{error.record['update']:06d}.pt"
        staged = path.with_name(f"{path.name}.tmp")
        try:
            with staged.open("wb") as file:
                torch.save({**error.record, "config": OmegaConf.to_container(cfg, resolve=True)}, file)
            os.replace(staged, path)
        except (OSError, RuntimeError) as failure:  # torch.save wraps what the disk says
            return RunError(f"{error}\nNothing was saved after it; {path} could not be written ({failure})")
        see = f"python -m spg.reproduce file={path}"
        return RunError(f"{error}\nNothing was saved after it. See it again with: {see}")
    return RunError(f"{error}\nGo on with: {again}")


def strategy(name: str) -> str | Strategy:
    """Return Lightning's strategy of that name (trainer.strategy), with PATIENCE where processes wait."""
    if name == "fsdp":
        return Sharded(PATIENCE)
    return DDPStrategy(timeout=PATIENCE) if name == "ddp" else name


def _fit(
    cfg: DictConfig,
    task: Task,
    folder: Path,
    started: float,
    begin: Path | None,
    changed: bool,
    group: str | None,
) -> bool:
    """Train from `begin` on, or from the start, and write the results."""
    first = rank() == 0
    saved = folder / "checkpoints"
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
    module = build_module(cfg, task)
    module.started = started
    loggers: list[Any] = []
    interruption = Interruption()
    validation = Validation(cfg.trainer.validate_every)
    checkpoints = Checkpoints(
        cfg.trainer.checkpoint_every, saved, validation, interruption, cfg.trainer.keep_every
    )
    tested = BeforeAndAfter(saved / "best.ckpt", validation)
    callbacks = [interruption, tested, validation, checkpoints]
    if first:
        metrics = MetricsCSV(folder)
        if state is not None and begin is not None:
            module.on_load_checkpoint(state)  # refused before anything is written
            metrics.up_to(module.updates)
            go_on_from(begin, state, saved, validation)
            metrics.cut(module.updates)
            log.info("Going on after update %d (%s)", module.updates, begin.name)
        if changed:
            write_config(cfg, folder)
        write_status(folder, state="running", error=None, max_updates=cfg.trainer.max_updates)
        loggers.append(metrics)
        if cfg.logger.wandb is not None:
            settings = OmegaConf.to_container(cfg, resolve=True)
            loggers.append(wandb_logger(**cfg.logger.wandb, folder=folder, config=settings, group=group))
        callbacks = [ProgressBar(), *callbacks, Samples(cfg.trainer.samples_every)]
    with interruption.listening():
        trainer = pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            strategy=strategy(cfg.trainer.strategy),
            devices=cfg.trainer.devices,
            precision="32-true",  # the policy computes in its own
            max_epochs=1,
            logger=loggers,
            callbacks=callbacks,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, RemainingPrompts(module), ckpt_path=begin, weights_only=True)
        if module.updates < module.max_updates:
            raise Interrupted(f"stopped after update {module.updates}, which is saved")
        sliced = None if sharding_of(module) is None else module.weights.whole()  # all processes take part
        if first:
            _finish(cfg, folder, module, sliced, tested, validation, unused)
    return interruption.asked


def go_on_from(checkpoint: Path, state: dict[str, Any], saved: Path, validation: Validation) -> None:
    """Make `checkpoint`, which holds `state`, the last one of `saved`, and best.ckpt agree with it.

    What stood there before is kept as replaced.ckpt and replaced-best.ckpt. At every moment last.ckpt is a
    whole checkpoint. best.ckpt may be of a later update than `state` knows, where the run goes back or was
    killed between two files: then the best is chosen from this checkpoint's update on.
    """
    for stale in saved.glob("*.tmp"):
        stale.unlink()
    _put(checkpoint, saved / "last.ckpt", saved / "replaced.ckpt")
    update = state["spg"]["updates"]
    known = Validation(validation.every)
    known.load_state_dict(state["callbacks"]["Validation"])
    best = saved / "best.ckpt"
    if known.best is None or (best.exists() and _update_of(best) == known.best[0]):
        return
    if update != known.best[0]:
        log.info("The best checkpoint before this one, of update %d, is no longer there", known.best[0])
        validation.since = update
    if update in dict(known.history):
        _put(checkpoint, best, saved / "replaced-best.ckpt")


def _update_of(path: Path) -> int | None:
    """Return the update of a checkpoint, None where it can't be read."""
    try:
        update: int = read_checkpoint(path)["spg"]["updates"]
    except ValueError:
        return None
    return update


def _put(checkpoint: Path, place: Path, before: Path) -> None:
    """Copy a checkpoint to `place`, which is whole at every moment; what stood there becomes `before`."""
    if checkpoint.resolve() == place.resolve():
        return
    staged = place.with_name(f"{place.name}.tmp")
    shutil.copyfile(checkpoint, staged)
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    if place.exists():
        before.unlink(missing_ok=True)
        os.link(place, before)
    os.replace(staged, place)


def _finish(
    cfg: DictConfig,
    folder: Path,
    module: Training,
    sliced: Mapping[str, Tensor] | None,
    tested: BeforeAndAfter,
    validation: Validation,
    unused: list[str],
) -> None:
    """Write weights, summary and curve of a run that has done all its updates, and show the table.

    sliced: the weights by their names in the module, where each process has slices of them only.
    """
    assert validation.best is not None
    if module.policy.has_adapter:
        module.policy.save_adapter(folder / "adapter")
    elif sliced is not None:
        tensors = {name.removeprefix("policy.network."): tensor for name, tensor in sliced.items()}
        save_tensors(tensors, folder / "weights.safetensors", {"update": str(module.updates)})
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
        "parameters.trained": sum(p.numel() for p in module.weights.tensors().values()),
        "seconds": module.elapsed(),
        **{f"seconds.{part}": spent for part, spent in module.seconds.items()},
        "unused_knobs": unused,
        "seed": cfg.seed,
        "threads": cfg.trainer.threads,
        "devices": cfg.trainer.devices,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(folder / "summary.json", summary)
    title = f"{module.task.name}, {summary['n']} examples a half, seed {cfg.seed}"
    curve(folder, title)
    show_summary(summary, folder)


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
    weights = next(name for name in ("weights.safetensors", "adapter") if (folder / name).exists())
    log.info("Run directory: %s (curve.png, metrics.csv, summary.json, %s)", folder, weights)
