"""What Lightning is told about the processes of a run. It never finds out for itself.

Lightning's own choice takes any shell on a cluster for a task of a job, writes checkpoints named hpc_ckpt_*
into the working directory when SLURM signals, and begins the next run from there with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from spg.core.process import Place, place


class Task(SLURMEnvironment):
    """A task of a SLURM step, which SLURM's own variables and `Place` describe; Lightning requeues nothing.

    Args:
        own: The place of this process.
    """

    def __init__(self, own: Place) -> None:
        self.own = own
        super().__init__(auto_requeue=False)

    def world_size(self) -> int:
        """Return the number of tasks of the step; SLURM_NTASKS may be the one of the job."""
        return self.own.size

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Accept the settings: `Place.complaint` has compared them with the step, not with the job."""

    @property
    def main_address(self) -> str:
        """Return the host of the first task."""
        return self.own.address

    @staticmethod
    def _validate_srun_used() -> None:
        """Do not look for srun: this process is one of its tasks."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """Do not ask for --ntasks-per-node: the tasks are counted already."""


def environment(own: Place | None = None) -> ClusterEnvironment:
    """Return Lightning's environment for a process.

    Args:
        own: Its place; None for the place of this process.
    """
    own = own or place()
    if own.launcher == "torchrun":
        return TorchElasticEnvironment()
    if own.launcher == "slurm":
        return Task(own)
    return LightningEnvironment()


def fixed_arguments(folder: Path, alone: bool = False) -> dict[str, Any]:
    """Return arguments that every `Trainer` here gets: nothing of Lightning's own is written or found.

    Args:
        folder: Directory of the run. Lightning would look for hpc_ckpt_* in its default folder.
        alone: Whether this process computes without the others.
    """
    return {
        "plugins": [LightningEnvironment() if alone else environment()],
        "default_root_dir": folder / ".lightning",  # never made
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
