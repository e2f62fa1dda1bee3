"""Runs that torchrun or SLURM starts, on one and on two nodes: their numbers, messages for mistakes, deaths.

There is no SLURM here. `srun` sets some variables and starts the tasks, and this is what the tests do.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from spg.core.files import read_csv
from spg.runs.status import read_status
from tests import warm
from tests.helpers import QUICK, ROOT, command, run, same_run
from tests.integration.test_parallel import SMALL, TWO, alive, close

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def tasks(count: int, nodes: int = 1) -> list[dict[str, str]]:
    """Return the variables that `srun` sets for each task of a step on this machine."""
    shared = {
        "SLURM_JOB_ID": str(random.SystemRandom().randrange(10**8)),
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NNODES": str(nodes),
        "SLURM_STEP_NUM_NODES": str(nodes),
    }
    own = count // nodes
    return [
        {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r % own), "SLURM_NODEID": str(r // own), **shared}
        for r in range(count)
    ]


started: list[warm.Popen] = []


@pytest.fixture(autouse=True)
def leave_none_behind() -> Iterator[None]:
    """End the tasks that a test which failed has left."""
    yield
    while started:
        started.pop().kill()


def srun(module: str, *lines: str, count: int = 2, nodes: int = 1) -> list[warm.Popen]:
    """Start the tasks of a step."""
    step = [
        warm.Popen(command(module, *lines), cwd=ROOT, env={**ENVIRONMENT, **variables})
        for variables in tasks(count, nodes)
    ]
    started.extend(step)
    return step


def srun_to_the_end(module: str, *lines: str, count: int = 2, nodes: int = 1) -> tuple[set[int | None], str]:
    """Run the tasks of a step to their ends; return their exit codes and what all of them wrote."""
    step = srun(module, *lines, count=count, nodes=nodes)
    texts = ["".join(one.communicate(120)) for one in step]
    return {one.returncode for one in step}, "".join(texts)


def torchrun(
    *lines: str,
    options: tuple[str, ...] = ("--nnodes=1", "--nproc-per-node=2"),
    before: tuple[str, ...] = (),
    module: str = "spg.train",
) -> subprocess.Popen[str]:
    """Start `<before> torchrun <options> -m <module> <lines>`."""
    given = {"--rdzv-backend": "c10d", "--rdzv-endpoint": "localhost:0"}
    given |= dict(option.split("=", 1) for option in options)
    start = [*before, str(BIN / "torchrun"), *(f"{key}={value}" for key, value in given.items())]
    return subprocess.Popen(
        [*start, "-m", module, *lines],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("module", "lines", "text"),
    [
        (
            "train",
            (),
            "srun started 2 tasks on 1 node, but trainer.nodes=1 and trainer.devices=1 make 1; give ",
        ),
        (
            "evaluate",
            ("model=tiny",),
            "spg.evaluate works in one process, and srun started 2; start it alone: ",
        ),
        pytest.param(
            "train", ("trainer.devces=2",), "there is no key 'trainer.devces'", marks=pytest.mark.long
        ),
        pytest.param(
            "train",
            (*TWO, "-m", "seed=1,2"),
            "srun started 2 processes, but a job of a multirun",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "train",
            (*TWO, "trainer.nodes=2"),
            "trainer.nodes=2 and trainer.devices=2",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_mistake_is_one_line_of_the_first_task(
    module: str, lines: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    """(c): Lightning's traceback before."""
    codes, said = srun_to_the_end(module, *lines, f"hydra.run.dir={tmp_path / 'run'}")
    assert codes == {2}
    assert text in said
    assert said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_batch_script_without_srun_is_told_to_use_it(tmp_path: Path) -> None:
    variables = {k: v for k, v in tasks(16, 2)[0].items() if "STEP" not in k}
    lines = ("trainer=ddp", "trainer.nodes=2", "trainer.devices=8", f"hydra.run.dir={tmp_path / 'run'}")
    done = warm.run(command("train", *lines), cwd=ROOT, env={**ENVIRONMENT, **variables})
    assert done.returncode == 2
    assert "needs a launcher: srun python -m spg.train ..." in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose two processes the first one started."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    run("train", *QUICK, *SMALL, *TWO, folder=folder)
    return folder


@pytest.mark.long
def test_two_processes_of_torchrun_are_two_of_a_run_alone_and_the_update_of_one(
    alone: Path, tmp_path: Path
) -> None:
    """(e): a traceback before."""
    two = torchrun(*QUICK, *SMALL, *TWO, f"hydra.run.dir={tmp_path / 'torchrun'}")
    text = two.communicate(timeout=180)[0]
    assert two.returncode == 0, text
    assert text.count("Run directory:") == 1, "one process tells"
    assert same_run(alone, tmp_path / "torchrun")
    run("train", *QUICK, *SMALL, folder=tmp_path / "one")
    close(tmp_path / "one", tmp_path / "torchrun")
    names = {p.name for p in (tmp_path / "torchrun").iterdir()}
    assert names == {p.name for p in alone.iterdir()}
    summary = json.loads((tmp_path / "torchrun" / "summary.json").read_text())
    assert (summary["devices"], summary["nodes"], summary["n"]) == (2, 1, 31), "each item once"


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, 2])
def test_two_tasks_of_srun_are_one_pair(alone: Path, tmp_path: Path, nodes: int) -> None:
    """(d): two pairs before, which took the same port and then waited for ever."""
    shape = (f"trainer.nodes={nodes}", f"trainer.devices={2 // nodes}")
    lines = (*QUICK, *SMALL, *TWO, *shape, f"hydra.run.dir={tmp_path / 'run'}")
    codes, text = srun_to_the_end("train", *lines, nodes=nodes)
    assert codes == {0}, text
    assert text.count("Run directory:") == 1
    assert same_run(alone, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "1"}, tasks(1)[0]], ids=["batch", "step of one task"])
def test_in_a_job_of_one_task_a_run_starts_its_processes_itself(
    alone: Path, tmp_path: Path, variables: Mapping[str, str]
) -> None:
    """(b): both processes took rank 0 before."""
    line = command("train", *QUICK, *SMALL, *TWO, f"hydra.run.dir={tmp_path / 'run'}")
    done = warm.run(line, cwd=ROOT, env={**ENVIRONMENT, **variables})
    assert done.returncode == 0, done.stderr
    assert same_run(alone, tmp_path / "run")


Node = tuple[tuple[str, ...], tuple[str, ...]]


@pytest.fixture(params=["ports", "namespaces"])
def two_nodes(request: pytest.FixtureRequest) -> Iterator[list[Node]]:
    """Yield for each of two nodes what stands before `torchrun`, and options of its own.

    Nodes are network namespaces, which root can make, or just two starts on this machine.
    """
    if request.param == "ports":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield [((), (f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=two"))] * 2
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root can make network namespaces")
    names = [f"spg{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
            if made.returncode:
                pytest.skip("network namespaces can't be made here")
        pair = ["veth", "peer", "name", "veth1", "netns", names[1]]
        subprocess.run(["ip", "link", "add", "veth0", "netns", names[0], "type", *pair], check=True)
        for number, name in enumerate(names):
            for words in (
                ["addr", "add", f"10.77.0.{number + 1}/24", "dev", f"veth{number}"],
                ["link", "set", f"veth{number}", "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run(["ip", "-n", name, *words], check=True)
        yield [
            (
                ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME=veth{number}"),
                (
                    "--rdzv-endpoint=10.77.0.1:29400",
                    "--rdzv-id=two",
                    f"--local-addr=10.77.0.{number + 1}",
                    f"--rdzv-conf=is_host={1 - number}",
                ),
            )
            for number, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.long
def test_two_nodes_of_one_process_are_two_processes_of_one_node(
    alone: Path, tmp_path: Path, two_nodes: list[Node]
) -> None:
    """(e): a ValueError before."""
    shape = ("trainer.nodes=2", "trainer.devices=1", f"hydra.run.dir={tmp_path / 'run'}")
    both = [
        torchrun(
            *QUICK, *SMALL, *TWO, *shape, before=before, options=("--nnodes=2", "--nproc-per-node=1", *own)
        )
        for before, own in two_nodes
    ]
    texts = [one.communicate(timeout=240)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], texts
    assert sum(text.count("Run directory:") for text in texts) == 1
    assert same_run(alone, tmp_path / "run")


LONG = (*QUICK, *TWO, "trainer.max_updates=4000", "trainer.checkpoint_every=2", "mu=2", "task.eval_size=4")


def wait_for_checkpoint(folder: Path) -> None:
    """Wait until a run has saved its state."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def workers(words: str, variable: str) -> dict[int, int]:
    """Return the processes with `words` in their command by their rank, which a variable holds."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().decode()
            environment = (path / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        ranks = [text.partition("=")[2] for text in environment if text.startswith(f"{variable}=")]
        if words in line and ranks and alive(int(path.name)):
            found[int(ranks[0])] = int(path.name)
    return found


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_task_that_dies_is_named_and_the_others_end(tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "a run"
    step = srun("train", *LONG, f"hydra.run.dir={folder}")
    wait_for_checkpoint(folder)
    step[victim].kill()
    before = time.monotonic()
    text = "".join(step[1 - victim].communicate(60))
    assert time.monotonic() - before < 60
    assert step[1 - victim].returncode == 1
    name = (
        f"of rank {victim} (of 2 processes; host {socket.gethostname()}, pid {step[victim].pid}) ended unex"
    )
    assert name in text
    assert f"srun <options as before> python -m spg.train 'resume={folder}'" in text
    assert "Traceback" not in text
    status = read_status(folder)
    assert status["state"] == "failed"
    assert name in status["error"]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_under_torchrun_too_who_is_left_tells_the_truth(tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    both = torchrun(*LONG, f"hydra.run.dir={folder}")
    wait_for_checkpoint(folder)
    pid = workers(str(folder), "RANK")[victim]
    os.kill(pid, signal.SIGKILL)
    text = both.communicate(timeout=60)[0]
    assert both.returncode == 1
    name = f"the process of rank {victim} (of 2 processes; host {socket.gethostname()}, pid {pid})"
    assert f"{name} ended unexpectedly" in text
    assert f"torchrun <options as before> -m spg.train resume={folder}" in text
    assert read_status(folder)["state"] == "failed"
    assert name in read_status(folder)["error"]


@pytest.mark.long
def test_a_process_that_is_stopped_for_a_minute_is_named_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    step = srun("train", *LONG, f"hydra.run.dir={folder}")
    wait_for_checkpoint(folder)
    step[1].send_signal(signal.SIGSTOP)
    time.sleep(60)
    assert [one.poll() for one in step] == [None, None]
    before = len(read_csv(folder / "metrics.csv"))
    step[1].send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 60
    while len(read_csv(folder / "metrics.csv")) < before + 4:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for one in step:
        one.send_signal(signal.SIGTERM)
    text = "".join("".join(one.communicate(60)) for one in step)
    assert [one.returncode for one in step] == [130, 0]
    assert (
        f"rank 1 (of 2 processes; host {socket.gethostname()}, pid {step[1].pid}) has been silent for" in text
    )
    assert "answers again" in text
    assert read_status(folder)["state"] == "interrupted"


@pytest.mark.long
def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_stopped_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    step = srun("train", *LONG, f"hydra.run.dir={folder}")
    wait_for_checkpoint(folder)
    step[1].send_signal(signal.SIGSTOP)
    time.sleep(3)
    step[0].send_signal(signal.SIGTERM)
    before = time.monotonic()
    text = "".join(step[0].communicate(90))
    assert 15 < time.monotonic() - before < 80
    assert step[0].returncode == 1
    assert "has been silent for" in text
    assert read_status(folder)["state"] == "failed"
    step[1].send_signal(signal.SIGCONT)
    step[1].wait(60)
    assert step[1].returncode == 1


@pytest.mark.long
def test_base_weights_are_made_once_and_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "SPG_CACHE", str(tmp_path / "cache"))
    lines = (*QUICK, *SMALL, *TWO, "pretrain.steps=7", f"hydra.run.dir={tmp_path / 'run'}")
    codes, text = srun_to_the_end("train", *lines)
    assert codes == {0}, text
    assert text.count("Pretrained in") == 1
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


@pytest.mark.long
def test_what_one_process_raises_is_told_with_its_rank(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lines = (*LONG, f"hydra.run.dir={folder}")
    both = (command("train", *lines), command("tests.faults", "fails_at=3", "spg.train", *lines))
    step = [
        warm.Popen(line, cwd=ROOT, env={**ENVIRONMENT, **own})
        for line, own in zip(both, tasks(2), strict=True)
    ]
    started.extend(step)
    texts = ["".join(one.communicate(120)) for one in step]
    assert [one.returncode for one in step] == [1, 1], texts
    name = f"the process of rank 1 (of 2 processes; host {socket.gethostname()}, pid {step[1].pid})"
    assert f"{name} failed: ZeroDivisionError: planted; the others were ended" in texts[0]
    assert "Traceback" not in texts[0]
    assert "Traceback" in texts[1]
    assert name in read_status(folder)["error"]


@pytest.mark.long
def test_under_torchrun_a_number_that_is_not_finite_is_kept_to_be_seen_again(tmp_path: Path) -> None:
    lines = ("loss_is_inf=3", "spg.train", *LONG, f"hydra.run.dir={tmp_path / 'run'}")
    both = torchrun(*lines, module="tests.faults")
    text = both.communicate(timeout=120)[0]
    assert both.returncode == 1
    assert "See it again with: python -m spg.reproduce file=" in text
    assert [path.name for path in (tmp_path / "run").glob("nonfinite*")] == ["nonfinite-update-000003.pt"]


@pytest.mark.long
def test_killed_at_random_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """SPG_KILLS=10 makes it ten runs, each with a kill at a random moment of a random process."""
    lines = (*QUICK, *SMALL, *TWO, "trainer.max_updates=60", "trainer.validate_every=20")
    whole = torchrun(*lines, f"hydra.run.dir={tmp_path / 'whole'}")
    before = time.monotonic()
    assert whole.wait(240) == 0
    lasts = time.monotonic() - before
    chance = random.Random(os.environ.get("SPG_SEED", "14"))
    for number in range(int(os.environ.get("SPG_KILLS", "2"))):
        folder = tmp_path / str(number)
        by_itself = number % 2 == 0  # else the user gives another command
        auto = ("resume=auto",) if by_itself else ()
        restarts = ("--nnodes=1", "--nproc-per-node=2", f"--max-restarts={int(by_itself)}")
        both = torchrun(*lines, *auto, f"hydra.run.dir={folder}", options=restarts)
        wait_for_checkpoint(folder)
        time.sleep(chance.uniform(0.0, lasts / 4))
        found = workers(str(folder), "RANK")
        assert found, "the run lasts longer than the wait"
        os.kill(found[chance.randrange(2)], signal.SIGKILL)
        text = both.communicate(timeout=240)[0]
        assert both.returncode == int(not by_itself), text
        if not by_itself:
            again = torchrun(f"resume={folder}")
            text = again.communicate(timeout=240)[0]
            assert again.returncode == 0, text
        assert same_run(tmp_path / "whole", folder)
