"""From a command line to its job: one run, a multirun, or a run that goes on; and how each may end."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from spg.config import (
    CONF_DIR,
    ConfigError,
    Plan,
    group_choices,
    preflight,
    show_help,
    sweep_folder,
    task_of_run,
)
from spg.core.console import take_over_logging
from spg.core.errors import InputError, Interrupted, RunError
from spg.core.files import DISK_FULL, write_json
from spg.reports.tables import show_jobs
from spg.runs.jobs import LEFT_ALONE, STOPPING
from spg.runs.multirun import write_runs
from spg.runs.status import read_status

log = logging.getLogger(__name__)


def run(
    primary: str,
    job: Callable[[DictConfig], Any],
    resume: Callable[[str, list[str]], Any] | None = None,
    report: Callable[[Path], Any] | None = None,
) -> None:
    """Check the command line against the primary config `primary`, then let Hydra run `job`.

    resume: what to do instead with the path and the other overrides, where `resume=<path>` is among them.
    report: what tells, at the end of a multirun, what is in its directory; by default a table of runs.
    Ends the process with 2 after a mistake of the user's, 1 after a failure, 130 after an interruption.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let our errors through, unwrapped
    try:
        argv = _multirun_first(group_choices(sys.argv[1:]))
        paths = [line.removeprefix("resume=") for line in argv if line.startswith("resume=")]
        if resume is not None and paths and not {"--help", "-h"} & set(argv):
            others = [line for line in argv if not line.startswith("resume=")]
            flags = [line for line in others if line.startswith("-")]
            if flags:
                raise ConfigError(f"{flags[0]} can't be given together with resume=...; leave it out")
            resume(paths[-1], others)
            return
        task = task_of_run(argv) if primary == "evaluate" else None
        os.environ["SPG_RUN_TASK"] = task or ""
        words = [[task, line] if task is not None and line.startswith("run=") else [line] for line in argv]
        plan = preflight(primary, [word for pair in words for word in pair])
        if plan.help:
            show_help(primary, plan.own)
            return
        sys.argv[1:] = plan.arguments
        failures: list[Exception] = []

        def told(cfg: DictConfig) -> None:
            try:
                job(cfg)
            except (InputError, RunError, OSError) as error:  # Hydra would put a line of its own before it
                failures.append(error)

        app = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=primary)(told)
        if plan.multirun and resume is not None:  # else its jobs are no runs
            _sweep(primary, plan, argv, app, report or _report_runs)
        else:
            with _writable("hydra.run.dir"):
                app()
        if failures:
            raise failures[0]
    except InputError as error:
        _end(str(error), 2)
    except RunError as error:
        _end(str(error), 1)
    except (Interrupted, KeyboardInterrupt) as stop:
        _end(str(stop) or "stopped", 130)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _end(f"{error}: make room, then go on with resume=<run dir>", 1)


def _multirun_first(argv: list[str]) -> list[str]:
    """Put --multirun at the front: Hydra takes it before or behind the overrides, not among them."""
    flags = [line for line in argv if line in ("-m", "--multirun")]
    return [*flags[:1], *(line for line in argv if line not in flags)]


@contextmanager
def _writable(option: str) -> Iterator[None]:
    """Raise ConfigError where the output folder or its log can't be made; a job's errors don't come here."""
    try:
        yield
    except (OSError, ValueError) as error:
        # logging raises ValueError from what the system says of a log's file
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno in DISK_FULL:
            raise
        if cause is not error and "configure handler" not in str(error):
            raise
        raise ConfigError(f"{option}: nothing can be written there ({cause}); give another folder") from error


def _end(text: str, code: int) -> None:
    sys.stderr.write(f"{text}\n")
    sys.exit(code)


def _report_runs(folder: Path) -> None:
    write_runs(folder)
    show_jobs(folder)


def _sweep(
    primary: str, plan: Plan, argv: list[str], app: Callable[[], Any], report: Callable[[Path], Any]
) -> None:
    """Run a multirun, then show all its jobs; raises RunError where some did not finish."""
    os.environ["SPG_SWEEP"] = plan.name
    os.environ["SPG_SWEPT"] = json.dumps(plan.swept)
    folder = sweep_folder(primary, plan)
    with _writable("hydra.sweep.dir"):
        folder.mkdir(parents=True, exist_ok=True)
    module = "train" if primary == "config" else primary
    command = shlex.join(["python", "-m", f"spg.{module}", *argv])
    about, alone = folder / "sweep.json", folder / LEFT_ALONE
    record = {"name": plan.name, "command": command, "swept": list(plan.swept)}
    if about.is_file():
        before = json.loads(about.read_text(encoding="utf-8"))
        if before["swept"] != list(plan.swept):
            raise ConfigError(
                f"{folder} holds another multirun ({before['command']}); give another hydra.sweep.dir"
            )
    else:
        write_json(about, record)
    alone.unlink(missing_ok=True)
    stopping = folder / STOPPING
    stopping.unlink(missing_ok=True)
    failure: Exception | None = None
    try:
        with _stopping_by(stopping):
            app()
    except KeyboardInterrupt:
        stopping.touch()
    except Exception as error:  # noqa: BLE001  # a launcher's: raised below, when what the jobs did is told
        failure = error
    take_over_logging()
    if not alone.exists():  # else the directory may hold another command's jobs
        write_json(about, record)
    report(folder)
    log.info("Multirun: %s", folder)
    if alone.exists():
        number = len(alone.read_text(encoding="utf-8").splitlines())
        raise RunError(
            f"{number} of the multirun's jobs were left alone: their directories are in use, or hold other "
            f"runs; {alone} says which"
        )
    if stopping.exists():
        stopping.unlink()
        raise Interrupted(f"stopped; the multirun goes on with the same command: {command}")
    if failure is not None:
        raise RunError(
            f"the launcher ended early ({failure!r}); the same command again does what is left: {command}"
        ) from failure
    names = {job_name(list(values)) for values in plan.jobs}
    left = [name for name in names if read_status(folder / name).get("state") != "finished"]
    if left:
        raise RunError(
            f"{len(left)} of the multirun's {len(names)} jobs did not finish; the same command "
            f"again does these only: {command}"
        )


@contextmanager
def _stopping_by(marker: Path) -> Iterator[None]:
    """Answer Ctrl-C outside a job's training with `marker`: the jobs at work save, no other starts.

    A second one ends the multirun at once.
    """

    def note(number: int, frame: Any) -> None:
        if marker.exists():
            raise KeyboardInterrupt
        marker.touch()
        log.info("Stopping when the jobs at work have saved; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def swept() -> list[str]:
    """Return the keys that the multirun sweeps, [] outside one."""
    keys: list[str] = json.loads(os.environ.get("SPG_SWEPT", "[]"))
    return keys


def swept_values(cfg: DictConfig) -> dict[str, Any]:
    """Return this job's values of the swept keys."""
    choices = HydraConfig.get().runtime.choices
    values = {key: choices[key] if key in choices else OmegaConf.select(cfg, key) for key in swept()}
    return {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in values.items()}


def job_name(overrides: list[str]) -> str:
    """Return a directory name for a job with these overrides, which the command line takes as it is.

    It is made of the swept keys and values: `estimator-elbo_seed-1`.
    """
    given = dict(line.lstrip("+").partition("=")[::2] for line in overrides)
    parts = []
    for key in swept():
        value = given.get(key, "")
        plain = re.sub(r"[^A-Za-z0-9.-]", "-", value)
        # what was replaced still tells jobs apart
        mark = "" if plain == value else f"-{zlib.crc32(value.encode()):08x}"
        parts.append(f"{re.sub(r'[^A-Za-z0-9_.-]', '.', key)}-{plain}{mark}")
    return "_".join(parts) or "job"


def method() -> str:
    """Return what a run is named after: its estimator where the algorithm is SPG, else the algorithm."""
    choices = HydraConfig.get().runtime.choices
    return str(choices["estimator"] if choices["algorithm"] == "spg" else choices["algorithm"])


OmegaConf.register_new_resolver("method", method, replace=True)
OmegaConf.register_new_resolver(
    "job_name", lambda: job_name(list(HydraConfig.get().overrides.task)), replace=True
)
