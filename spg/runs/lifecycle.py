"""Starting a training run and going on with one.

A run's directory holds its resolved config.yaml from the start; status.json says what has happened since.
How to train is the caller's: these functions get a callable for it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from spg import config
from spg.config import ConfigError
from spg.core import link
from spg.core.commands import command_line
from spg.core.errors import Interrupted, RunError
from spg.core.files import DISK_FULL
from spg.core.link import leave
from spg.core.process import place, rank
from spg.models import base_weights, hub
from spg.runs.directory import find_config, last_logged, log_to, read_config, write_config
from spg.runs.identity import apply_changes, changes, check_same, identity
from spg.runs.signals import StopRequest, requeue
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
        stop: Notes the signals that ask it to stop.
    """

    cfg: DictConfig
    folder: Path
    checkpoint: Path | None = None
    changes: tuple[str, ...] = ()
    group: str | None = None
    started: float = field(default_factory=time.perf_counter)
    stop: StopRequest = field(default_factory=StopRequest)


# trains a run; returns whether the user asked to stop when nothing was left to stop
Train = Callable[[Run], bool]


def start(cfg: DictConfig, folder: Path, overrides: Sequence[str], train: Train) -> None:
    """Start a run in `folder`.

    Raises:
        ConfigError: if the folder already holds a run or an evaluation, or if the run could not be requeued.
    """
    _check_holds_no_evaluation(folder)
    if _holds_work(folder):
        raise ConfigError(
            f"{folder} holds a run already; go on with it ({command_line('train', f'resume={folder}')}), or "
            "give another hydra.run.dir"
        )
    if cfg.trainer.requeue:
        raise ConfigError(
            "trainer.requeue=true: a job that SLURM requeues gives the same command again, which must go on "
            f"with the run then; add resume=auto hydra.run.dir={folder}"
        )
    with lock(folder):
        cfg = hub.settle(cfg)
        begin(cfg, folder, overrides)
        work(Run(cfg, folder), train)


def start_or_resume(cfg: DictConfig, folder: Path, overrides: Sequence[str], train: Train) -> None:
    """Start a run in `folder`, or go on with the one that is there if it has the same settings.

    If that run is finished, nothing is done, unless `cfg` has more updates.

    Raises:
        ConfigError: if the folder holds a run with other settings, or an evaluation.
    """
    _check_holds_no_evaluation(folder)
    with lock(folder):
        cfg = hub.settle(cfg)
        before = find_config(folder)
        if before is None and not _holds_work(folder):
            begin(cfg, folder, overrides)
            work(Run(cfg, folder), train)
            return
        if before is None:
            write_config(cfg, folder)  # the other processes read it
        else:
            config.check_complete(before, folder / "config.yaml")
            check_same(identity(before), identity(cfg), folder, "hydra.run.dir")
            finished = read_status(folder).get("state") == "finished"
            if finished and cfg.trainer.max_updates <= before.trainer.max_updates:
                log.info("Finished already: %s", folder)
                return
        work(Run(cfg, folder, None, tuple(changes(before or cfg, cfg))), train)


def _check_holds_no_evaluation(folder: Path) -> None:
    if (folder / "generations.jsonl").exists():
        raise ConfigError(f"{folder} holds an evaluation; give another hydra.run.dir")


def _holds_work(folder: Path) -> bool:
    """Return whether a folder holds something of a run that could be lost."""
    return any((folder / name).exists() for name in ("metrics.csv", "checkpoints"))


def begin(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Write the first status and the configuration of a run, and log what its user should know about it."""
    # whether a key is read shows in interpolations, which config.yaml, being resolved, no longer has
    about = {"unused_knobs": config.unread_knobs(cfg), "arguments": list(overrides), "saved": False}
    write_status(folder, state="running", **about)
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
        run = Run(cfg, folder, checkpoint, started=started)
        with run.stop.listen():
            train(run)
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
    """Train a run and write to its status how that ended; return what `train` returned.

    If a scheduler has stopped it and trainer.requeue is set, the job is put back into the queue.

    Raises:
        ConfigError: if the run had checkpoints, and they are gone.
    """
    check_checkpoints_are_there(run)
    with run.stop.listen():
        try:
            with record_failure(run.folder), _explain_full_disk(run.folder), _explain_early_stop(run):
                asked = train(run)
        except Interrupted:
            run.stop.over = True
            if run.cfg.trainer.get("requeue", False):  # not in runs of version 0.5
                requeue(run.stop.by)
            raise
        write_status(run.folder, state="finished", updates=run.cfg.trainer.max_updates)
    return asked


@contextmanager
def _explain_early_stop(run: Run) -> Iterator[None]:
    """Raise RunError if a launcher stopped this process before training, because another one has died.

    Otherwise trainer.requeue would start a run again and again that can't begin.
    """
    try:
        yield
    except Interrupted as stop:
        connection = link.current()
        if connection is not None and connection.dead is not None and not run.stop.training:
            raise RunError(f"{connection.dead}; the others were ended") from stop
        raise


@contextmanager
def _explain_full_disk(folder: Path) -> Iterator[None]:
    """Raise RunError for an OSError of a full disk in a `with` block, with the command that goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        what = error.filename or f"a file in {folder}"
        raise RunError(
            f"{what} could not be written ({error.strerror}); what was saved is whole: make room, then "
            f"go on with: {place().command(f'resume={folder}')}"
        ) from error


def check_checkpoints_are_there(run: Run) -> None:
    """Refuse to begin a run anew that has been trained already, but has lost its checkpoints.

    A run that was killed before its first checkpoint was written may begin anew.

    Raises:
        ConfigError: if there is no checkpoint, and there was one.
    """
    folder, cfg = run.folder, run.cfg
    if run.checkpoint is not None or any((folder / "checkpoints").glob("*.ckpt")):
        return
    status, logged = read_status(folder), last_logged(folder)
    # runs of version 0.5 do not note their first checkpoint; it was written before the rollout after it
    first = -(-cfg.trainer.checkpoint_every // cfg.mu) * cfg.mu
    if status.get("state") == "finished" or status.get("saved", logged > first):
        done = status.get("updates", logged)
        raise ConfigError(
            f"{folder} holds a run that has done {done} updates, but its checkpoints are gone, and it would "
            "begin anew over its metrics and weights; put a checkpoint back into "
            f"{folder / 'checkpoints'}, or start a new run in another directory"
        )
