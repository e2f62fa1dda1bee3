"""Training a module to its last update, and what a run leaves at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import OmegaConf
from torch import Tensor

from spg.core.errors import Interrupted
from spg.core.examples import Example
from spg.core.files import write_json
from spg.core.process import rank
from spg.models.weights import save_tensors, save_weights
from spg.reports.plots import plot_run
from spg.reports.summary import show_summary
from spg.runs.directory import write_config
from spg.runs.lifecycle import Run
from spg.runs.provenance import git_commit, versions
from spg.runs.status import read_status, write_status
from spg.training.callbacks import (
    BeforeAndAfter,
    Checkpoints,
    Interruption,
    ProgressBar,
    Samples,
    Validation,
)
from spg.training.checkpoint import processes_of
from spg.training.environment import fixed_arguments
from spg.training.fsdp import Sharded, sharding_of
from spg.training.loggers import MetricsCSV, wandb_logger
from spg.training.module import Training
from spg.training.resumption import Start, rewind_files
from spg.training.settings import TrainerSettings

log = logging.getLogger(__name__)

# how long a process waits for the slowest one: its rollouts, the programs that check them, its share of an
# evaluation. Half an hour, as Lightning has it, is too short for billions of parameters; if a process dies,
# `Processes` notices within seconds.
PATIENCE = timedelta(hours=4)


class Rollouts:
    """The prompts of each rollout that a module has yet to do; Lightning iterates over them as batches."""

    def __init__(self, module: Training) -> None:
        self.module = module

    def __iter__(self) -> Iterator[list[Example]]:
        return self.module.remaining_prompts()


def make_strategy(settings: TrainerSettings) -> str | Strategy:
    """Return Lightning's strategy for the settings; processes wait up to PATIENCE."""
    if settings.strategy == "fsdp":
        return Sharded(PATIENCE, write_slices=settings.checkpoint_format == "sharded")
    return DDPStrategy(timeout=PATIENCE) if settings.strategy == "ddp" else settings.strategy


def fit(module: Training, run: Run, settings: TrainerSettings, start: Start | None = None) -> bool:
    """Train a module up to its last update and write the results to the run's directory.

    Every process of a run calls this; the first one writes.

    Args:
        module: The module; its counters follow `start`.
        run: The run, with its configuration and directory.
        settings: What happens between updates.
        start: Checkpoint to go on from; None to begin.

    Returns:
        Whether the user asked to stop when nothing was left to stop.

    Raises:
        RunError: if `start` does not fit the run, or if a file can't be written.
        Interrupted: if the user asked to stop and updates are left; they are saved.
    """
    first = rank() == 0
    module.started = run.started
    saved = run.folder / "checkpoints"
    interruption = Interruption(run.stop)
    validation = Validation(settings.validate_every)
    tested = BeforeAndAfter(saved / "best.ckpt", validation)
    checkpoints = Checkpoints(settings.checkpoint_every, saved, validation, settings.keep_every)
    callbacks: list[pl.Callback] = [interruption, tested, validation, checkpoints]
    loggers: list[Logger] = []
    if first:
        metrics = MetricsCSV(run.folder)
        if start is not None:
            _rewind(module, start, run, settings, metrics, validation)
        loggers = [metrics, *_open(run)]
        callbacks = [ProgressBar(), *callbacks, Samples(settings.samples_every)]
    with interruption.listen():
        trainer = pl.Trainer(
            accelerator=settings.accelerator,
            strategy=make_strategy(settings),
            devices=settings.devices,
            num_nodes=settings.nodes,
            precision="32-true",  # the policy has a precision of its own
            logger=loggers,
            callbacks=callbacks,
            **fixed_arguments(run.folder),
        )
        interruption.keep_signals(trainer)
        trainer.fit(module, Rollouts(module), ckpt_path=start and start.path, weights_only=True)
        if module.updates < module.max_updates:
            raise Interrupted(f"stopped after update {module.updates}, which is saved")
        sliced = None if sharding_of(module) is None else module.weights.whole()  # all processes take part
        if first:
            _save_model(module, sliced, run)
            _report(module, run, settings, {**tested.summary(), **_validated(validation, tested)})
    return interruption.asked


def _rewind(
    module: Training,
    start: Start,
    run: Run,
    settings: TrainerSettings,
    metrics: MetricsCSV,
    validation: Validation,
) -> None:
    """Set module, metrics and files back to `start`; raise RunError before anything is written."""
    module.on_load_checkpoint(start.state)
    metrics.up_to(module.updates)
    rewind_files(start, run.folder / "checkpoints", validation)
    metrics.cut(module.updates)
    log.info("Going on after update %d (%s)", module.updates, start.path.name)
    before, now = processes_of(start.state), settings.nodes * settings.devices
    if before != now:
        log.info(
            "%d processes go on with the work of %d: rounding changes, and the noise of an adapter's dropout",
            now,
            before,
        )


def _open(run: Run) -> list[Logger]:
    """Write that the run is running, and with what; return the W&B logger if one is asked for."""
    write_config(run.cfg, run.folder)
    write_status(run.folder, state="running", error=None, max_updates=run.cfg.trainer.max_updates)
    if run.cfg.logger.wandb is None:
        return []
    settings = OmegaConf.to_container(run.cfg, resolve=True)
    return [wandb_logger(**run.cfg.logger.wandb, folder=run.folder, config=settings, group=run.group)]


def _save_model(module: Training, sliced: Mapping[str, Tensor] | None, run: Run) -> None:
    """Write the weights, or the adapter, as the last update left them.

    Args:
        module: The trained module.
        sliced: Whole weights by their names in the module, if every process holds slices of them only.
        run: The run.
    """
    about = {"update": str(module.updates)}
    if module.policy.has_adapter:
        module.policy.save_adapter(run.folder / "adapter")
    elif sliced is not None:
        tensors = {name.removeprefix("policy.network."): tensor for name, tensor in sliced.items()}
        save_tensors(tensors, run.folder / "weights.safetensors", about)
    else:
        save_weights(module.policy.network, run.folder / "weights.safetensors", about)


def _validated(validation: Validation, tested: BeforeAndAfter) -> dict[str, Any]:
    """Return what the summary says about the validation half."""
    assert validation.best is not None
    return {
        "validation.before": validation.history[0][1],
        "validation.best": validation.best[1],
        "validation.last": validation.history[-1][1],
        "best.update": validation.best[0],
        "best.checkpoint": str(tested.best),
    }


def _report(module: Training, run: Run, settings: TrainerSettings, measured: Mapping[str, Any]) -> None:
    """Write summary.json and the curve, and show the table."""
    summary = {
        **measured,
        "updates": module.updates,
        "rollouts": module.rollouts,
        "parameters": sum(p.numel() for p in module.policy.parameters()),
        "parameters.trained": sum(p.numel() for p in module.weights.tensors().values()),
        "seconds": module.elapsed(),
        **{f"seconds.{part}": spent for part, spent in module.seconds.items()},
        "unused_knobs": read_status(run.folder).get("unused_knobs", []),
        "seed": module.seed,
        "threads": settings.threads,
        "devices": settings.devices,
        "nodes": settings.nodes,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(run.folder / "summary.json", summary)
    plot_run(run.folder, f"{module.task.name}, {summary['n']} examples a half, seed {module.seed}")
    show_summary(summary, run.folder)
