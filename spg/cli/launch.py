"""From a command line to its job: one run, a multirun, or a run that goes on; and how each may end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from spg.cli import processes
from spg.cli.job_function import JobFunction
from spg.cli.sweep import check_writable, sweep
from spg.config import (
    CONF_DIR,
    ConfigError,
    check_folder_is_fixed,
    group_choices,
    preflight,
    quote_paths,
    show_help,
    task_of_run,
    unquote,
)
from spg.core.errors import InputError, Interrupted, RunError
from spg.core.files import DISK_FULL
from spg.core.process import place
from spg.reports.tables import show_jobs
from spg.runs.multirun import write_runs

Job = Callable[[DictConfig], Any]
Resume = Callable[[str, list[str]], Any]


def run(
    primary: str,
    job: Job,
    resume: Resume | None = None,
    report: Callable[[Path], Any] | None = None,
    prepare: Callable[[], object] | None = None,
) -> None:
    """Check the command line of this process, then do what it asks for.

    The process ends with 2 after a mistake of the user, 1 after a failure, 130 after an interruption, which
    is 0 if torchrun has started it.

    Args:
        primary: Name of the primary configuration.
        job: Does the work of a configuration.
        resume: Goes on with the work in a directory. It gets the path of `resume=<path>` and the other
            overrides.
        report: Reports on the directory of a multirun at its end; by default with a table of runs.
        prepare: Imports what the processes of a run need; None if the command is for one process.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises the errors of a job as they are
    shared = processes.share("train" if primary == "config" else primary, prepare)
    # the message comes before the other processes of the run hear of the end
    with _explain_errors(), shared, _explain_errors():
        _run(primary, job, resume, report or _report_runs)


@contextmanager
def _explain_errors() -> Iterator[None]:
    """End this process with a message and the code of its error, if a `with` block raises one for users."""
    try:
        yield
    except InputError as error:
        _end(str(error), 2)
    except RunError as error:
        _end(str(error), 1)
    except (Interrupted, KeyboardInterrupt) as stop:
        # torchrun would take any other code for a failure, and start the run again
        _end(str(stop) or "stopped", 0 if place().launcher == "torchrun" else 130)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _end(f"{error}: make room, then start again (a run that has begun goes on with resume=<run dir>)", 1)


def _run(primary: str, job: Job, resume: Resume | None, report: Callable[[Path], Any]) -> None:
    argv = _put_multirun_first(quote_paths(group_choices(sys.argv[1:])))
    whole = argv
    paths = [unquote(line.removeprefix("resume=")) for line in argv if line.startswith("resume=")]
    others = [line for line in argv if not line.startswith("resume=")]
    auto = primary == "config" and paths[-1:] == ["auto"]
    if auto:
        argv = others
    elif resume is not None and paths and not {"--help", "-h"} & set(argv):
        flags = [line for line in others if line.startswith("-")]
        if flags:
            raise ConfigError(f"{flags[0]} can't be given together with resume=...; leave it out")
        try:
            resume(paths[-1], others)
        except OmegaConfBaseException as error:  # a setting that this version reads is not there
            raise ConfigError(
                f"resume={paths[-1]}: {' '.join(str(error).split())} in its config.yaml, which is not as it "
                "was written; restore the file, or start anew"
            ) from error
        return
    plan = preflight(primary, _add_task_of_run(argv) if primary == "evaluate" else argv)
    if plan.help:
        show_help(primary, plan.own)
        return
    auto = auto and not plan.multirun  # jobs of a multirun go on in any case
    if auto:
        check_folder_is_fixed(primary, plan)
    sys.argv[1:] = whole if auto else plan.arguments
    function = JobFunction(job)
    app = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=primary)(function)
    if plan.multirun:
        processes.refuse_several("a multirun")
    if plan.multirun and resume is not None:  # the jobs of other commands leave no directories to go on with
        sweep(primary, plan, argv, app, report)
    else:
        with check_writable("hydra.run.dir"):
            app()
    if function.failures:
        raise function.failures[0]


def _put_multirun_first(argv: Sequence[str]) -> list[str]:
    """Return the arguments with --multirun first: Hydra does not take it among the overrides."""
    flags = [line for line in argv if line in ("-m", "--multirun")]
    return [*flags[:1], *(line for line in argv if line not in flags)]


def _add_task_of_run(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the task of `run=<dir>` before it, and note that the user did not give it."""
    task = task_of_run(list(argv))
    os.environ["SPG_RUN_TASK"] = task or ""
    if task is None:
        return list(argv)
    return [word for line in argv for word in ([task, line] if line.startswith("run=") else [line])]


def _end(text: str, code: int) -> None:
    if not processes.tell_first(text):
        sys.stderr.write(f"{text}\n")
    sys.exit(code)


def _report_runs(folder: Path) -> None:
    write_runs(folder)
    show_jobs(folder)
