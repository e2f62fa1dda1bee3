"""`python -m spg.train`: reinforcement learning of a masked diffusion language model.

`--help` lists what can be set, group by group.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from spg import config
from spg.cli import launch
from spg.cli.job_names import swept_values
from spg.core.process import rank
from spg.runs import lifecycle
from spg.runs.jobs import train_job
from spg.runs.lifecycle import Run

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Train as configured and leave a run directory with weights, metrics, curve and summary."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        train_job(cfg, folder, overrides, swept_values(cfg), train)
    else:
        config.check(cfg)
        begin = start_or_resume if cfg.resume == "auto" else start
        cfg.resume = None  # of the command, and no setting of the run
        begin(cfg, folder, overrides)


def start(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Start a run in `folder`; `overrides` is what the command line gave."""
    lifecycle.start(cfg, folder, overrides, train)


def start_or_resume(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Start a run in `folder`, or go on with the one that is there, or leave it if it is finished."""
    lifecycle.start_or_resume(cfg, folder, overrides, train)


def resume(path: str, overrides: Sequence[str] = ()) -> None:
    """Go on with the run in the directory `path`, or from one of its checkpoints."""
    lifecycle.resume(path, overrides, train)


def train(run: Run) -> bool:
    """Build the objects that the run's configuration describes, and train.

    Returns:
        Whether the user asked to stop when nothing was left to stop.
    """
    cfg, folder = run.cfg, run.folder
    if cfg.trainer.devices * cfg.trainer.get("nodes", 1) > 1 or run.group is not None:
        # threads that wait spinning are fast alone, and starve those of other processes on the same cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from spg.models.factory import check_device
    from spg.training.assembly import build_module, load_task
    from spg.training.failures import explain_failures
    from spg.training.launching import Processes, prepare_process
    from spg.training.pretraining import ensure_base_weights
    from spg.training.resumption import find_checkpoint, read_start
    from spg.training.run import fit
    from spg.training.settings import TrainerSettings

    settings = TrainerSettings.of(cfg.trainer)
    prepare_process(settings.threads)
    log.info("Run: %s", folder)

    others = Processes(run, [], settings.nodes * settings.devices)
    with explain_failures(cfg, folder):
        check_device(cfg)
        task = load_task(cfg)  # if data are missing, no base weights need to be made
        if rank() == 0 and cfg.model.weights == "base":
            ensure_base_weights(cfg)  # made once, and not by each process
        # another process gets the one that the first has found
        checkpoint = run.checkpoint if rank() > 0 else find_checkpoint(run.checkpoint, folder / "checkpoints")
        others.arguments = [f"resume={(checkpoint or folder).absolute()}", *run.changes]
        with others:
            start = read_start(checkpoint)
            return fit(build_module(cfg, task), run, settings, start)


def main() -> None:
    """Run the command."""
    launch.run("config", job, resume, prepare=lambda: importlib.import_module("spg.training.run"))
