"""What Lightning is told about the processes of a run, whatever variables are set."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from spg.core.process import find_place
from spg.training.environment import Task, environment, fixed_arguments
from tests.unit.core.test_process import BATCH, TASK, TORCHRUN


def trainer_in(folder: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> pl.Trainer:
    """Return a trainer of one process in a shell with these variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, **fixed_arguments(folder))


@pytest.mark.parametrize("variables", [BATCH, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "2"}])
def test_in_a_shell_of_a_cluster_lightning_neither_joins_nor_requeues(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM_NTASKS=2 ended in Lightning's traceback before; a signal left hpc_ckpt_1.ckpt."""
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    trainer = trainer_in(tmp_path, variables, monkeypatch)
    chosen = trainer._accelerator_connector.cluster_environment
    assert type(chosen) is LightningEnvironment
    assert trainer._checkpoint_connector._hpc_resume_path is None, "the next run began with that file"
    assert trainer.world_size == 1


def test_each_launcher_has_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(environment(find_place({}))) is LightningEnvironment
    assert type(environment(find_place(TORCHRUN))) is TorchElasticEnvironment
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")  # Lightning would refuse the step
    monkeypatch.setenv("SLURM_NTASKS", "8")  # the job's; the step has 4 tasks
    own = environment()
    assert isinstance(own, SLURMEnvironment)
    assert not own.auto_requeue
    own.validate_settings(2, 2)
    assert (own.global_rank(), own.world_size(), own.local_rank(), own.node_rank()) == (3, 4, 1, 1)
    assert own.main_address == "gpu03"


def test_base_weights_are_made_by_one_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    (plugin,) = fixed_arguments(tmp_path, alone=True)["plugins"]
    assert type(plugin) is LightningEnvironment
    assert not isinstance(plugin, Task)
