"""The jobs of a multirun: each is a run or an evaluation of its own, and none stops the others by failing."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spg import config
from spg.core.errors import InputError, Interrupted, RunError
from spg.models import hub
from spg.runs.directory import find_config
from spg.runs.identity import OtherRunError, check_same, identity
from spg.runs.lifecycle import Run, Train, begin, work
from spg.runs.status import InUseError, lock, read_status, write_status
from spg.runs.watching import STOPPING, is_elsewhere, parent_is_gone, requeue_at_time_limit, watch

log = logging.getLogger(__name__)

# file in the directory of a multirun: which jobs the last command did not touch, and why
LEFT_ALONE = "left-alone.txt"


def train_job(
    cfg: DictConfig, folder: Path, overrides: Sequence[str], values: Mapping[str, Any], train: Train
) -> None:
    """Do one training run of a multirun: start it, go on with it, or leave it as it is if it is finished.

    Args:
        cfg: Configuration of the job.
        folder: Directory of the job, inside that of the multirun.
        overrides: The job's own part of the command line.
        values: The job's values of the swept keys.
        train: Trains a run.
    """

    def do() -> bool:
        config.check(cfg)
        config.check_launcher(cfg, multirun=True)
        own = hub.settle(cfg)
        if not (folder / "config.yaml").exists():
            begin(own, folder, overrides)
        before = find_config(folder) or own  # a file that can't be read is written again when the run goes on
        config.check_complete(before, folder / "config.yaml")
        check_same(identity(before), identity(own), folder)
        finished = _is_finished(folder)
        if finished and own.trainer.max_updates <= before.trainer.max_updates:
            log.info("Finished already: %s", folder)
            if read_status(folder).get("overrides") != dict(values):  # status.json was lost
                write_status(folder, overrides=dict(values))
            return False
        write_status(folder, overrides=dict(values))
        return work(Run(own, folder, group=folder.parent.name), train)

    run_job(folder, values, do)


def run_job(folder: Path, values: Mapping[str, Any], do: Callable[[], bool]) -> None:
    """Do one job of a multirun in `folder`, unless the multirun is being stopped.

    If the job fails, status.json and error.txt say so, and the multirun goes on. A directory that is in use,
    or holds another run, is not touched. If the user stops one job, no other job starts; the error is not
    raised, because joblib would then kill the jobs that are still running. A job on a cluster may be stopped
    by itself, and the others go on. If the process of the multirun is gone, no job starts, and running ones
    save and stop.

    Args:
        folder: Directory of the job, inside that of the multirun.
        values: The job's values of the swept keys.
        do: Does the job; returns whether the user asked to stop meanwhile.
    """
    stopping = folder.parent / STOPPING
    if stopping.exists():
        return
    if parent_is_gone():
        log.warning("%s not started: the process of the multirun is gone", folder.name)
        return
    try:
        with (
            lock(folder),
            requeue_at_time_limit(lambda: _is_finished(folder)),
            _stop_the_others(folder.parent),
            watch(folder.parent),
        ):
            if do() and not is_elsewhere():
                stopping.touch()
            (folder / "error.txt").unlink(missing_ok=True)  # of an earlier failure
    except (Interrupted, KeyboardInterrupt) as stop:
        log.info("%s: %s", folder.name, stop or "stopped")
    except (InUseError, OtherRunError) as error:
        log.error("%s left alone: %s", folder.name, error)
        with (folder.parent / LEFT_ALONE).open("a", encoding="utf-8") as file:
            file.write(f"{folder.name}: {error}\n")
    except (RunError, InputError) as error:
        log.error("%s failed: %s", folder.name, error)
        _write_failure(folder, values, str(error))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is reported, and the other jobs go on
        log.error("%s failed: %r (%s)", folder.name, error, folder / "error.txt")
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        _write_failure(folder, values, f"{type(error).__name__}: {error}")


@contextmanager
def _stop_the_others(multirun: Path) -> Iterator[None]:
    """Let no other job of a multirun on this machine start if a `with` block is interrupted.

    If the process of the multirun is gone, the next command may be at work already.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        if not is_elsewhere() and not parent_is_gone():
            (multirun / STOPPING).touch()
        raise


def _is_finished(folder: Path) -> bool:
    return read_status(folder).get("state") == "finished"


def _write_failure(folder: Path, values: Mapping[str, Any], text: str) -> None:
    if not _is_finished(folder):  # a finished run stays finished
        write_status(folder, state="failed", error=text.splitlines()[0], overrides=dict(values))
