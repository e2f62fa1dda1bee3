"""Hydra's own keys on the command line, and jobs that submitit starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spg import config
from spg.config.launchers import fill_in_submitit

LOCAL, SLURM = "hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands named as those of SLURM."""
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hydra.run.dri=x", "nearest: hydra.run.dir"),
        ("hydra.runn.dir=x", "there is no key 'hydra.runn.dir'"),
        ("+hydra.launcher.x=1", "there is no key 'hydra.launcher.x'"),
        ("-m hydra/launcher=submitit_slrm", "nearest: hydra/launcher=submitit_slurm"),
        (f"-m {LOCAL} hydra.launcher.timeout=3", "nearest: hydra.launcher.timeout_min"),
        (
            f"-m {LOCAL} hydra.launcher.timeout_min=long",
            "timeout_min=long: Value 'long' of type 'str' could not",
        ),
        ("-m hydra/launcher=joblib hydra.launcher.n_job=2", "nearest: hydra.launcher.n_jobs"),
        (f"-m {LOCAL} hydra.launcher.tasks_per_node=2", "each job of a multirun is one task"),
        (f"-m {LOCAL} trainer=ddp trainer.nodes=2", "trainer.nodes=2: the jobs of a multirun have one node"),
        (f"-m {LOCAL} trainer.requeue=true", "submitit itself requeues the jobs"),
    ],
)
def test_a_wrong_setting_of_hydra_s_is_answered_with_the_nearest(line: str, words: str) -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.preflight("config", line.split())
    assert words in str(caught.value)


def test_without_slurm_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(config.ConfigError, match="does not have sbatch and srun; start the multirun on"):
        config.preflight("config", ["-m", "seed=1,2", SLURM])


@pytest.mark.usefixtures("cluster")
def test_the_command_line_gets_what_a_job_asks_for() -> None:
    eight = ["trainer=ddp", "trainer.devices=8", "trainer.prompts_per_rollout=8"]
    plan = config.preflight("config", ["-m", "seed=1", SLURM, *eight])
    assert plan.elsewhere
    found = {line.removeprefix("hydra.launcher.") for line in plan.arguments[6:]}
    assert {"gpus_per_node=8", "cpus_per_task=16", "signal_delay_s=300", "max_num_timeout=100"} < found


@pytest.mark.parametrize(
    ("launcher", "accelerator", "given", "expected"),
    [
        ("Slurm", "auto", [], {"cpus_per_task": 4, "gpus_per_node": 2}),
        ("Slurm", "cpu", [], {"cpus_per_task": 4}),
        ("Slurm", "auto", ["gres"], {"cpus_per_task": 4}),
        ("Slurm", "auto", ["cpus_per_task", "name"], {"gpus_per_node": 2}),
        ("Local", "cuda", [], {"timeout_min": 10080, "gpus_per_node": 2}),
    ],
)
def test_what_the_command_line_says_of_a_job_is_not_filled_in(
    launcher: str, accelerator: str, given: list[str], expected: dict[str, int]
) -> None:
    settings = OmegaConf.create({"launcher": {"_target_": f"submitit_launcher.{launcher}Launcher"}})
    job = OmegaConf.create({"trainer": {"devices": 2, "threads": 2, "accelerator": accelerator}})
    found = fill_in_submitit(settings, [job, job], [f"hydra.launcher.{key}" for key in given], "beta")
    limits = {"signal_delay_s": 300, "max_num_timeout": 100} if launcher == "Slurm" else {}
    assert found == expected | limits | ({} if "name" in given else {"name": "beta"})
