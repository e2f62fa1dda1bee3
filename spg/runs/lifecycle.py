"""Starting a training run and going on with one.

A run's directory holds its resolved config.yaml from the start; status.json says what has happened since.
How to train is the caller's: these functions get a callable for it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from spg import config
from spg.config import ConfigError
from spg.core.commands import command_line
from spg.core.link import leave
from spg.core.process import rank
from spg.models import base_weights, hub
from spg.runs.directory import log_to, read_config, write_config
from spg.runs.identity import apply_changes
from spg.runs.status import lock, read_status, record_failure, write_status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A training run to do, or to go on with.

    Attributes:
        cfg: Its whole configuration.
        folder: Its directory.
        checkpoint: Where to go on from; None for the last checkpoint of the directory, if there is one.
        changes: Overrides, already in `cfg`, that the run goes on with.
        group: Name of the multirun that the run belongs to.
        started: Value of time.perf_counter() when the command began.
    """

    cfg: DictConfig
    folder: Path
    checkpoint: Path | None = None
    changes: tuple[str, ...] = ()
    group: str | None = None
    started: float = field(default_factory=time.perf_counter)


# trains a run; returns whether the user asked to stop when nothing was left to stop
Train = Callable[[Run], bool]


def start(cfg: DictConfig, folder: Path, overrides: Sequence[str], train: Train) -> None:
    """Start a run in `folder`.

    Raises:
        ConfigError: if the folder already holds a run or an evaluation.
    """
    if (folder / "generations.jsonl").exists():
        raise ConfigError(f"{folder} holds an evaluation; give another hydra.run.dir")
    if any((folder / name).exists() for name in ("metrics.csv", "checkpoints")):  # what could be lost
        raise ConfigError(
            f"{folder} holds a run already; go on with it ({command_line('train', f'resume={folder}')}), or "
            "give another hydra.run.dir"
        )
    with lock(folder):
        cfg = hub.settle(cfg)
        begin(cfg, folder, overrides)
        work(Run(cfg, folder), train)


def begin(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Write the first status and the configuration of a run, and log what its user should know about it."""
    # whether a key is read shows in interpolations, which config.yaml, being resolved, no longer has
    write_status(folder, state="running", unused_knobs=config.unread_knobs(cfg), arguments=list(overrides))
    write_config(cfg, folder)
    missing = base_weights.announce(cfg)
    for line in (*config.notes(cfg, list(overrides)), *([] if missing is None else [missing])):
        log.warning(line)


def resume(path: str, overrides: Sequence[str], train: Train) -> None:
    """Go on with the run in the directory `path`, or from a checkpoint at `path`.

    Raises:
        ConfigError: if it is not a run, or if an override would change what has been done already.
    """
    started = time.perf_counter()
    target = Path(path)
    folder = target.parent.parent if target.suffix == ".ckpt" else target
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"resume={path} is not the directory of a run: it has no config.yaml; give the directory that "
            "`python -m spg.train` printed, or a checkpoint in it"
        )
    before = read_config(folder)
    config.check_complete(before, folder / "config.yaml")
    cfg = apply_changes(before, overrides, folder)
    config.check(cfg)
    config.check_launcher(cfg)
    checkpoint = target if target.suffix == ".ckpt" else None
    if rank() > 0:
        train(Run(cfg, folder, checkpoint, started=started))
        logging.shutdown()
        leave()
        # threads of gloo may abort an ordinary exit, which the first process would take for a death
        os._exit(0)
    with lock(folder):
        if read_status(folder).get("state") == "finished" and checkpoint is None and cfg == before:
            raise ConfigError(
                f"resume={path}: this run is finished; train on with a higher trainer.max_updates than "
                f"{before.trainer.max_updates}"
            )
        log_to(folder / "train.log")
        group = folder.parent.name if (folder.parent / "sweep.json").is_file() else None
        work(Run(cfg, folder, checkpoint, tuple(overrides), group), train)


def work(run: Run, train: Train) -> bool:
    """Train a run and write to its status how that ended; return what `train` returned."""
    with record_failure(run.folder):
        asked = train(run)
    write_status(run.folder, state="finished", updates=run.cfg.trainer.max_updates)
    return asked
