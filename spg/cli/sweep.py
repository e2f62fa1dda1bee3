"""Running a multirun: its directory, Ctrl-C, and what is left to do at its end."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spg.cli.job_names import SWEPT, job_name
from spg.config import ConfigError, Plan, quote, sweep_folder
from spg.core.console import take_over_logging
from spg.core.errors import Interrupted, RunError
from spg.core.files import DISK_FULL, write_json
from spg.runs.jobs import LEFT_ALONE
from spg.runs.status import read_status
from spg.runs.watching import STOPPING, note_parent

log = logging.getLogger(__name__)

# said before submitit starts the jobs
WHERE = (
    "The jobs write their output to {folder}/.submitit. Ctrl-C lets running jobs save and stop, and no other "
    "starts. The jobs do not need this process: if it ends, they go on, and the same command makes the table "
    "later."
)


def sweep(
    primary: str,
    plan: Plan,
    argv: Sequence[str],
    app: Callable[[], Any],
    report: Callable[[Path], Any],
) -> None:
    """Run a multirun, then report on all jobs of its directory.

    Args:
        primary: Name of the primary configuration.
        plan: What the command line asks for.
        argv: The command line, for the command that is noted and shown.
        app: Lets Hydra run the jobs.
        report: Reports on the directory of the multirun.

    Raises:
        ConfigError: if the directory holds another multirun, or can't be written to.
        RunError: if some jobs did not finish.
        Interrupted: if the user asked to stop.
    """
    os.environ["SPG_SWEEP"] = plan.name
    os.environ[SWEPT] = json.dumps(plan.swept)
    note_parent()
    folder = sweep_folder(primary, plan)
    with check_writable("hydra.sweep.dir"):
        folder.mkdir(parents=True, exist_ok=True)
    module = "train" if primary == "config" else primary
    command = shlex.join(["python", "-m", f"spg.{module}", *argv])
    record = {"name": plan.name, "command": command, "swept": list(plan.swept)}
    _open(folder, record)
    if plan.elsewhere:
        take_over_logging()
        log.warning(WHERE.format(folder=folder))
        # a node may have another working directory
        sys.argv.append(f"hydra.sweep.dir={quote(str(folder.absolute()))}")
    stopping, alone = folder / STOPPING, folder / LEFT_ALONE
    failure: Exception | None = None
    try:
        with _stop_by(stopping):
            app()
    except KeyboardInterrupt:
        stopping.touch()
    except Exception as error:  # noqa: BLE001  # an error of the launcher, raised below, after the report
        failure = error
    take_over_logging()
    if not alone.exists():  # else the directory may hold the jobs of another command
        write_json(folder / "sweep.json", record)
    report(folder)
    log.info("Multirun: %s", folder)
    _check_done(folder, plan, command, failure)


def _open(folder: Path, record: dict[str, Any]) -> None:
    """Write sweep.json, unless there is one, and remove what an earlier command noted."""
    about = folder / "sweep.json"
    if about.is_file():
        before = json.loads(about.read_text(encoding="utf-8"))
        if before["swept"] != record["swept"]:
            raise ConfigError(
                f"{folder} holds another multirun ({before['command']}); give another hydra.sweep.dir"
            )
    else:
        write_json(about, record)
    for name in (LEFT_ALONE, STOPPING):
        (folder / name).unlink(missing_ok=True)


def _check_done(folder: Path, plan: Plan, command: str, failure: Exception | None) -> None:
    """Raise if jobs were left alone, if the multirun was stopped, or if jobs did not finish."""
    alone, stopping = folder / LEFT_ALONE, folder / STOPPING
    if alone.exists():
        number = len(alone.read_text(encoding="utf-8").splitlines())
        raise RunError(
            f"{number} of the multirun's jobs were left alone: their directories are in use, or hold other "
            f"runs; {alone} says which"
        )
    if stopping.exists():
        if not plan.elsewhere:  # else jobs in a queue look for it later
            stopping.unlink()
        raise Interrupted(f"stopped; the multirun goes on with the same command: {command}")
    if failure is not None:
        text = (str(failure) or type(failure).__name__).splitlines()[0]
        when = " when its other jobs have ended" if plan.elsewhere else ""
        raise RunError(
            f"the launcher ended early ({type(failure).__name__}: {text}); the same command again{when} does "
            f"what is left: {command}"
        ) from failure
    names = {job_name(values) for values in plan.jobs}
    left = [name for name in names if read_status(folder / name).get("state") != "finished"]
    if left:
        raise RunError(
            f"{len(left)} of the multirun's {len(names)} jobs did not finish; the same command "
            f"again does these only: {command}"
        )


@contextmanager
def _stop_by(marker: Path) -> Iterator[None]:
    """Make the file `marker` at Ctrl-C: the jobs that are running save their state, and no other starts.

    A second Ctrl-C ends the multirun at once. While a job trains it handles the signal itself.
    """

    def handle(number: int, frame: Any) -> None:
        if marker.exists():
            raise KeyboardInterrupt
        marker.touch()
        log.info("Stopping when the jobs at work have saved; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def check_writable(option: str) -> Iterator[None]:
    """Raise ConfigError if the `with` block can't make the output folder or its log.

    Errors of a job do not come here.

    Args:
        option: The key that sets the folder, for the message.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # logging raises a ValueError from the OSError of a log's file
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno in DISK_FULL:
            raise
        if cause is not error and "configure handler" not in str(error):
            raise
        raise ConfigError(f"{option}: nothing can be written there ({cause}); give another folder") from error
