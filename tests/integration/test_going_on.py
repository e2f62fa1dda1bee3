"""One command that starts a run or goes on with it: after kills and signals, and under torchrun."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spg.core.errors import Interrupted
from spg.runs.status import read_status
from tests import faults, warm
from tests.helpers import QUICK, ROOT, command, comparable, run, same_run, train_here
from tests.integration.test_parallel import SMALL, TWO

TORCHRUN = (
    *(str(Path(sys.executable).parent / "torchrun"), "--nnodes=1", "--nproc-per-node=2", "--max-restarts=3"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "spg.train"),
)
LONGER = (*QUICK, *SMALL, "trainer.max_updates=40")


def updates_done(folder: Path) -> int:
    """Return the update of the last checkpoint of a run, 0 if there is none."""
    path = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(path)["spg"]["updates"]) if path.exists() else 0


def wait_for_update(folder: Path, update: int, process: warm.Popen | subprocess.Popen[str]) -> None:
    """Wait until a run has saved an update, or has ended."""
    deadline = time.monotonic() + 120
    while updates_done(folder) < update and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def workers(folder: Path) -> list[int]:
    """Return the processes that torchrun has started for the run in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        # its workers get no options of torchrun's
        if f"hydra.run.dir={folder}" in words and not any(w.startswith("--nnodes") for w in words):
            found.append(int(path.name))
    return found


def test_a_signal_of_slurm_saves_the_run_and_leaves_nothing_to_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would write hpc_ckpt_1.ckpt into the working folder; the next run from there would read it.

    Here one lies there and in the run's own folder from the start: the run begins at update 0 all the same.
    """
    monkeypatch.chdir(tmp_path)
    variables = {
        "JOB_ID": "17",
        "NTASKS": "1",
        "JOB_NAME": "train",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    for place in (tmp_path, folder):
        torch.save({"epoch": 3, "global_step": 40, "state_dict": {}}, place / "hpc_ckpt_1.ckpt")
    faults.signalled("USR1,USR1,TERM@4", monkeypatch.setattr)
    with pytest.raises(Interrupted, match="stopped after update 4, which is saved"):
        train_here(folder)
    assert [row["update"] for row in comparable(folder)] == ["0", "1", "2", "3", "4"]
    assert updates_done(folder) == 4
    assert read_status(folder)["state"] == "interrupted"
    assert {path.name for path in tmp_path.iterdir()} == {"hpc_ckpt_1.ckpt", "runs"}
    assert not list(folder.glob("**/hpc_ckpt_2*"))


@pytest.mark.long
def test_the_same_command_again_and_again_is_the_run_that_nothing_stopped(tmp_path: Path) -> None:
    """Killed, stopped by SIGUSR1 and SIGTERM, and killed; then it is finished, and stays so."""
    lines = [*QUICK, "trainer.max_updates=32", "resume=auto"]
    train_here(tmp_path / "whole", "trainer.max_updates=32")
    folder = tmp_path / "run"
    line = command("train", *lines, f"hydra.run.dir={folder}")
    dice = random.Random(time.time_ns())
    steps = [(0, signal.SIGKILL), (4, signal.SIGUSR1), (12, signal.SIGKILL), (20, signal.SIGTERM)]
    for update, number in steps:
        process = warm.Popen(line, cwd=ROOT)
        wait_for_update(folder, update, process)
        time.sleep(dice.random() * (4 if update == 0 else 0.3))
        process.send_signal(number)
        text = "".join(process.communicate(60))
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), text
        assert "Traceback" not in text
    text = run("train", *lines, folder=folder)
    assert "Run directory" in text
    assert same_run(tmp_path / "whole", folder)
    again = run("train", *lines, folder=folder)
    assert again.strip() == f"Finished already: {folder}"
    assert "beta=1.5, not 2.0" in run("train", *lines, "beta=2.0", folder=folder, check=False)
    assert same_run(tmp_path / "whole", folder)


@pytest.mark.long
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(tmp_path: Path) -> None:
    """Each process is killed once; at the same number of processes it is the same run, bit for bit."""
    run("train", *LONGER, *TWO, folder=tmp_path / "whole")
    folder = tmp_path / "run"
    lines = [*LONGER, *TWO, "resume=auto", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        [*TORCHRUN, *lines],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for update, number in ((4, 0), (16, 1)):
        wait_for_update(folder, update, process)
        os.kill(sorted(workers(folder))[number], signal.SIGKILL)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert text.count("Going on after update") >= 2, text  # once more if the processes did not meet in time
    assert same_run(tmp_path / "whole", folder)


@pytest.mark.long
def test_a_signal_to_one_process_of_torchrun_s_stops_all_of_them(tmp_path: Path) -> None:
    """torchrun takes the end for a good one, and does not start the run again."""
    folder = tmp_path / "run"
    lines = [*LONGER, *TWO, "trainer.max_updates=4000", "resume=auto", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        [*TORCHRUN, *lines],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_update(folder, 4, process)
    os.kill(sorted(workers(folder))[1], signal.SIGUSR1)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    assert "which is saved; go on with" in text
    assert text.count("Run: ") == 1, text
    assert read_status(folder)["state"] == "interrupted"
