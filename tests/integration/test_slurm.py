"""Jobs of a cluster, with stand-ins for SLURM's commands: multiruns by submitit, and the sample scripts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spg import config
from spg.core.files import read_csv
from spg.runs.status import read_status
from spg.runs.watching import STOPPING
from tests import slurm, warm
from tests.helpers import ROOT, command, run, same_run
from tests.integration.test_multirun import TINY

SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
CPU = "trainer.accelerator=cpu"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment in which SLURM's commands are the stand-ins."""
    environment = slurm.install(tmp_path / "slurm")
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    yield environment | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    slurm.end_all(environment)


def wait_for_update(folder: Path, update: int, seconds: float = 300.0) -> None:
    """Wait until the run in `folder` has logged an update."""
    deadline, path = time.monotonic() + seconds, folder / "metrics.csv"
    while not path.is_file() or not any(int(row["update"]) >= update for row in read_csv(path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def submit(environment: dict[str, str], folder: Path, *lines: str) -> subprocess.Popen[str]:
    """Start a multirun of two tiny jobs by submitit."""
    line = command("train", "-m", *TINY, CPU, "seed=1,2", f"hydra.sweep.dir={folder}", *lines)
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["submitit_slurm", "submitit_local"])
def test_jobs_that_submitit_starts_are_those_of_a_multirun_in_one_process(
    launcher: str, cluster: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    if launcher == "submitit_slurm":  # a cluster may pass on no environment
        cluster |= {"SBATCH_EXPORT": "NONE"}
    two = ("trainer=ddp", "trainer.devices=2") if launcher == "submitit_slurm" else ()
    process = submit(cluster, folder, f"hydra/launcher={launcher}", *two)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    assert "2 of 2 jobs finished" in text
    assert f"The jobs write their output to {folder}/.submitit." in text
    run("train", *TINY, CPU, "seed=2", *two, folder=tmp_path / "alone")
    assert same_run(folder / "seed-2", tmp_path / "alone")
    if launcher == "submitit_slurm":
        jobs = slurm.wait_for_all(cluster, 60)
        assert [job["State"] for job in jobs.values()] == ["COMPLETED", "COMPLETED"]
        options = next(iter(jobs.values()))["options"]
        assert (options["cpus-per-task"], options["signal"], options["ntasks-per-node"]) == (
            "2",
            "USR2@300",
            "1",
        )
        assert "gpus-per-node" not in options


@pytest.mark.long
def test_a_job_saves_at_its_time_limit_and_goes_on_when_it_is_requeued(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    folder, longer = tmp_path / "sweep", ("trainer.max_updates=40", "trainer.checkpoint_every=40")
    process = submit(cluster, folder, "hydra/launcher=submitit_slurm", *longer, "trainer.validate_every=40")
    wait_for_update(folder / "seed-1", 4)
    job = next(name for name in slurm.jobs_in(cluster) if name.endswith("_0"))
    slurm.send(cluster, job, signal.SIGUSR2)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    assert "2 of 2 jobs finished" in text, "the other job was not stopped"
    jobs = slurm.wait_for_all(cluster, 60)
    assert [about.get("restarts", 0) for about in jobs.values()] == [1, 0]
    assert "Going on after update" in (folder / "seed-1" / "train.log").read_text()
    run("train", *TINY, CPU, "seed=1", *longer, "trainer.validate_every=40", folder=tmp_path / "alone")
    assert same_run(folder / "seed-1", tmp_path / "alone")


@pytest.mark.long
def test_ctrl_c_lets_the_jobs_save_and_the_same_command_goes_on(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    folder, longer = tmp_path / "sweep", ("trainer.max_updates=40", "trainer.checkpoint_every=40")
    lines = ("hydra/launcher=submitit_slurm", *longer, "trainer.validate_every=40")
    process = submit(cluster, folder, *lines)
    wait_for_update(folder / "seed-1", 2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 130, text
    assert "the multirun goes on with the same command" in text
    assert (folder / STOPPING).exists(), "a job that is still queued must not start"
    assert read_status(folder / "seed-1")["state"] == "interrupted"
    process = submit(cluster, folder, *lines)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    assert "2 of 2 jobs finished" in text


@pytest.mark.long
def test_if_joblib_s_parent_is_killed_no_queued_job_starts_and_running_ones_save(tmp_path: Path) -> None:
    folder, longer = tmp_path / "sweep", ("trainer.max_updates=400", "trainer.validate_every=400")
    lines = ["-m", *TINY, CPU, *longer, "trainer.checkpoint_every=400", "seed=1,2,3,4"]
    line = command(
        "train", *lines, f"hydra.sweep.dir={folder}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    )
    process = warm.Popen(line, cwd=ROOT)
    for seed in (1, 2):
        wait_for_update(folder / f"seed-{seed}", 2)
    process.kill()
    killed = time.monotonic()
    states: list[str | None] = []
    while states != ["interrupted", "interrupted"]:
        assert time.monotonic() < killed + 30, states
        states = [read_status(folder / f"seed-{seed}").get("state") for seed in (1, 2)]
        time.sleep(0.2)
    time.sleep(5.0)
    started = sorted(path.parent.name for path in folder.glob("seed-*/status.json"))
    assert started == ["seed-1", "seed-2"], "Hydra makes the folder of a job that does not start"
    assert not (folder / STOPPING).exists(), "the same command goes on at once"
    for seed in (1, 2):
        logged = max(int(row["update"]) for row in read_csv(folder / f"seed-{seed}" / "metrics.csv"))
        assert f"after update {logged}" in read_status(folder / f"seed-{seed}")["error"]


def test_the_sample_scripts_are_right() -> None:
    assert [path.stem for path in SCRIPTS] == ["one_node", "several_nodes", "torchrun"]
    checked = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", *SCRIPTS], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    page = (ROOT / "docs" / "guide" / "slurm.md").read_text()
    for path in SCRIPTS:
        assert f'--8<-- "examples/slurm/{path.name}"' in page
        text = path.read_text()
        assert {"requeue", "open-mode=append"} < set(
            re.findall(r"^#SBATCH --(\S+)$", text, flags=re.MULTILINE)
        )
        written = re.search(r"spg\.train (.*)", text.replace("\\\n", ""))
        assert written is not None
        line = written[1]
        sizes = {"devices": "8", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "8", "@": ""}
        for name, value in (sizes | {"folder": "runs/x"}).items():
            line = line.replace(f'"${name}"', value)
        words = shlex.split(line)
        assert "resume=auto" in words
        config.preflight("config", [word for word in words if word != "resume=auto"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one_node", ["--gpus-per-node=2"]),
        ("several_nodes", ["--nodes=2", "--ntasks-per-node=1"]),
        ("torchrun", ["--nodes=2", "--gpus-per-node=1"]),
    ],
)
def test_a_sample_script_runs_saves_when_it_is_signalled_and_goes_on(
    name: str, options: list[str], cluster: dict[str, str], tmp_path: Path
) -> None:
    """Two processes in each case; SLURM's signal comes in the middle, and the job is requeued."""
    folder, script = tmp_path / "run", ROOT / "examples" / "slurm" / f"{name}.sbatch"
    longer = ["trainer.max_updates=40", "trainer.checkpoint_every=40", "trainer.validate_every=40"]
    lines = [*TINY, CPU, *longer]
    done = subprocess.run(
        ["sbatch", *options, str(script), *lines],
        cwd=tmp_path,
        env=cluster | {"SPG_RUN": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wait_for_update(folder, 4)
    (job,) = slurm.jobs_in(cluster)
    number = re.search(r"--signal=(\w+)@", script.read_text())
    assert number is not None
    slurm.send(cluster, job, signal.Signals[f"SIG{number[1]}"])
    (about,) = slurm.wait_for_all(cluster, 300).values()
    text = (tmp_path / f"slurm-{job}.out").read_text()
    assert about["State"] == "COMPLETED", text
    assert about["restarts"] == 1
    assert f"Requeued job {job}" in text
    assert read_status(folder)["state"] == "finished", text
    assert "Going on after update" in text
    shutil.rmtree(folder / "checkpoints")
    assert max(int(row["update"]) for row in read_csv(folder / "metrics.csv")) == 40
