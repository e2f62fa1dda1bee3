"""Who a process is, from the environment variables that launchers set."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from spg.config import ConfigError
from spg.config import check_launcher as check_numbers
from spg.core.errors import InputError
from spg.core.process import RANK, Place, check_launcher, find_place, first_host

# as torchrun sets them for the last of two nodes with two processes each
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "some-run",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "40001",
}
# as sbatch sets them for its script, which is no task
BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# as srun sets them for the last task of a step
TASK = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
ONE_TASK = {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}


def test_a_process_of_torchrun() -> None:
    found = find_place({**BATCH, **TORCHRUN})
    assert (found.launcher, found.rank, found.size, found.local_rank) == ("torchrun", 3, 4, 1)
    assert (found.nodes, found.per_node, found.address) == (2, 2, "node1")
    assert found.shared
    other = find_place({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert found.token == other.token, "torchrun counts on the node of the process that died alone"


def test_a_task_of_srun() -> None:
    found = find_place(TASK)
    assert (found.launcher, found.rank, found.size, found.local_rank) == ("slurm", 3, 4, 1)
    assert (found.nodes, found.per_node, found.address) == (2, 2, "gpu03")
    assert find_place({**TASK, "MASTER_ADDR": "10.0.0.1"}).address == "10.0.0.1"
    assert find_place({**TASK, "SLURM_STEP_ID": "1"}).token != found.token, "another step of the same job"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        BATCH,
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "1"},
        ONE_TASK,
        {**TASK, "SLURM_JOB_NAME": "bash"},
        {**TASK, "SLURM_JOB_NAME": "interactive"},
        {"LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    ],
    ids=["shell", "batch script", "bare", "one task", "submitit", "bash", "interactive", "one"],
)
def test_all_others_are_alone(variables: dict[str, str]) -> None:
    check_launcher(variables)
    assert find_place(variables) == Place()
    assert not find_place(variables).shared


def test_a_process_that_a_run_started_is_alone_whatever_the_shell_was() -> None:
    found = find_place({**TASK, "SLURM_JOB_NAME": "bash", RANK: "1"})
    assert (found.launcher, found.rank, found.local_rank) == ("alone", 1, 1)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_an_unknown_launcher_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"one of 2 \({name}\); start a run with torchrun"):
        check_launcher({name: "2"})
    check_launcher({name: "2", RANK: "1"})
    check_launcher(TORCHRUN)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("gpu3", "gpu3"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("a,b[1-2]", "a"),
        ("host0 host1", "host0"),
        ("rack[1-2]n[4,5]", "rack1n4"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("variables", "nodes", "devices", "text"),
    [
        ({}, 1, 8, None),
        (TORCHRUN, 2, 2, None),
        (TASK, 2, 2, None),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 1, 2, None),
        (
            TORCHRUN,
            1,
            4,
            "torchrun started 4 processes on 2 nodes, but trainer.nodes=1 and trainer.devices=4",
        ),
        (
            TORCHRUN,
            1,
            1,
            "give trainer=ddp trainer.nodes=2 trainer.devices=2, or start torchrun with --nnodes=1",
        ),
        (
            TASK,
            4,
            2,
            "srun started 4 tasks on 2 nodes, but trainer.nodes=4 and trainer.devices=2 make 8; give ",
        ),
        (
            {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"},
            1,
            2,
            "torchrun started 1 process on 1 node, but",
        ),
        ({}, 2, 8, "needs a launcher: torchrun --nnodes=2 --nproc-per-node=8"),
    ],
)
def test_the_configured_numbers_are_compared_with_the_launcher_s(
    variables: dict[str, str], nodes: int, devices: int, text: str | None
) -> None:
    complaint = find_place(variables).complaint(nodes, devices)
    assert complaint is None if text is None else complaint is not None and text in complaint
    assert complaint is None or "\n" not in complaint


def test_in_a_batch_script_srun_is_advised_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    complaint = find_place(BATCH).complaint(2, 8)
    assert complaint is not None
    assert "needs a launcher: srun python -m spg.train ..., in a job with --nodes=2" in complaint


def test_a_command_to_go_on_is_one_for_the_same_launcher() -> None:
    assert Place().command("resume=a b") == "python -m spg.train 'resume=a b'"
    assert find_place(TORCHRUN).command("x=1") == "torchrun <options as before> -m spg.train x=1"
    assert find_place(TASK).command("x=1") == "srun <options as before> python -m spg.train x=1"


def test_a_job_of_a_multirun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = OmegaConf.create({"trainer": {"nodes": 2, "devices": 2}})
    with pytest.raises(ConfigError, match=r"trainer\.nodes=2, but a job of a multirun is one process that"):
        check_numbers(cfg, multirun=True)
    del cfg.trainer["nodes"]  # not in runs of version 0.5
    check_numbers(cfg, multirun=True)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="srun started 4 processes, but a job"):
        check_numbers(cfg, multirun=True)
