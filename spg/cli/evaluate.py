"""`python -m spg.evaluate`: complete and score held-out examples with a model, a run, or from a file."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from spg import config
from spg.cli import base_weights, launch
from spg.cli.job_names import swept_values
from spg.config import ConfigError
from spg.core.commands import command_line
from spg.core.errors import Interrupted, RunError
from spg.evaluation.comparison import report_multirun
from spg.evaluation.settings import CHANGEABLE, fingerprints, merge_settings
from spg.runs import directory as runs
from spg.runs.identity import OtherRunError, apply_changes, check_same, identity
from spg.runs.jobs import run_job
from spg.runs.status import lock, read_status, record_failure, write_status

log = logging.getLogger(__name__)

# signals that end an evaluation; what was completed is saved
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def job(cfg: DictConfig) -> None:
    """Evaluate as configured and leave a folder with config.yaml, generations.jsonl and results.json."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    # a task that the command line did not choose is that of the run, with its settings
    overrides = [line for line in hydra_cfg.overrides.task if line != os.environ.get("SPG_RUN_TASK")]
    if hydra_cfg.mode == RunMode.MULTIRUN:
        values = swept_values(cfg)
        run_job(folder, values, lambda: sweep_job(merge_settings(cfg, overrides), folder, values))
    else:
        start(merge_settings(cfg, overrides), folder)


def start(cfg: DictConfig, folder: Path) -> None:
    """Start an evaluation in `folder`.

    Raises:
        ConfigError: if the folder holds an evaluation already, or a run.
    """
    if (folder / "generations.jsonl").exists():
        raise ConfigError(
            f"{folder} holds an evaluation already; go on with it "
            f"({command_line('evaluate', f'resume={folder}')}), or give another hydra.run.dir"
        )
    if runs.holds_run(folder):
        raise ConfigError(f"{folder} holds a training run; give another hydra.run.dir")
    with lock(folder):
        runs.write_config(cfg, folder)
        _work(cfg, folder)


def resume(path: str, overrides: list[str]) -> None:
    """Go on with the evaluation in the folder `path`.

    Raises:
        ConfigError: if it is not an evaluation, or a finished one, or an override would change its figures.
    """
    folder = Path(path)
    cfg = config.load_saved(folder / "config.yaml")
    if cfg is None or "generations" not in cfg:
        raise ConfigError(
            f"resume={path} is not the directory of an evaluation; give the one that "
            "`python -m spg.evaluate` printed"
        )
    changed = apply_changes(cfg, overrides, folder, CHANGEABLE)
    config.check(changed)
    with lock(folder):
        if read_status(folder).get("state") == "finished":
            saved = shlex.quote(f"generations={folder / 'generations.jsonl'}")
            raise ConfigError(
                f"resume={path}: this evaluation is finished: {folder / 'results.json'}; to score its "
                f"completions anew: {saved}"
            )
        runs.write_config(changed, folder)
        runs.log_to(folder / "evaluate.log")
        _work(changed, folder)


def sweep_job(cfg: DictConfig, folder: Path, values: dict[str, Any]) -> bool:
    """Do one job of a multirun, or what is left of it; return False: it never asks the others to stop."""
    before = config.load_saved(folder / "config.yaml")
    if before is not None:
        check_same(identity(before, CHANGEABLE), identity(cfg, CHANGEABLE), folder)
    status = read_status(folder)
    if status.get("state") == "finished":
        _same_files(status.get("made_with", {}), cfg, folder)
        log.info("Finished already: %s", folder)
        return False
    write_status(folder, overrides=values)
    runs.write_config(cfg, folder)
    _work(cfg, folder)
    return False


def _same_files(made_with: dict[str, Any], cfg: DictConfig, folder: Path) -> None:
    """Raise OtherRunError if the files behind the figures of a finished evaluation have changed."""
    before = {name: about for name, about in made_with.items() if name != "device"}
    now = fingerprints(cfg)
    others = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if others:
        raise OtherRunError(
            f"{folder} holds figures of {', '.join(others)} as it was before it changed; give another "
            "hydra.sweep.dir, or remove it"
        )


def _work(cfg: DictConfig, folder: Path) -> None:
    """Evaluate, and write to the folder's status how it ended; signals that stop it say how to go on."""
    again = command_line("evaluate", f"resume={folder}")
    write_status(folder, state="running", error=None)
    with (
        record_failure(folder),
        _stop_at_signals(f"stopped; what was completed is saved; go on with: {again}"),
    ):
        from spg.evaluation.run import run_evaluation

        try:
            run_evaluation(cfg, folder, base_weights.ensure)
        except RunError as error:
            raise RunError(f"{error}\nGo on with: {again}") from error
    write_status(folder, state="finished")


@contextmanager
def _stop_at_signals(words: str) -> Iterator[None]:
    """Raise Interrupted with `words` at Ctrl-C, SIGTERM and SIGUSR1, if this thread may handle signals."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(words)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command."""
    launch.run("evaluate", job, resume, report_multirun)
