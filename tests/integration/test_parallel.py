"""Several processes on one machine: the same update, each item once, one writer, no zombies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.world import World
from spg.evaluation.completer import Completer
from spg.evaluation.evaluator import evaluate
from spg.rollout.decoder import Decoder
from spg.runs.status import read_status
from spg.tasks.sudoku import Sudoku
from tests.helpers import QUICK, ROOT, command, comparable, run, small_policy, train_here

TWO = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
SMALL = (
    "task.eval_size=31",
    "optimizer.lr=1e-3",
    "mu=2",
    "trainer.max_updates=4",
    "trainer.checkpoint_every=2",
)


def close(one: Path, two: Path) -> None:
    """Check that two runs have the same metrics and weights, up to rounding."""
    for row, other in zip(comparable(one), comparable(two), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert bool(value) == bool(other[name]), name
            if value:
                assert float(value) == pytest.approx(float(other[name]), abs=2e-6, rel=1e-5), name
    first, second = (load_file(folder / "weights.safetensors") for folder in (one, two))
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst < 1e-6


@pytest.mark.parametrize(
    ("loss_norm", "more"),
    [
        ("group", ("trainer.micro_batch_size=37", "advantage=shifted", "algorithm.objective.kl_coef=0.01")),
        pytest.param(
            "batch",
            ("estimator=eubo", "trainer.prompts_per_rollout=2", "group_size=2", "seed=4"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_two_processes_give_the_update_of_one(tmp_path: Path, loss_norm: str, more: tuple[str, ...]) -> None:
    """Half of the prompts each; pieces of unlike number, an advantage and a norm over all prompts.

    In the second case one of the two has nothing to learn from in some update, and must not be waited for.
    """
    lines = [*QUICK, *SMALL, f"algorithm.objective.loss_norm={loss_norm}", *more]
    run("train", *lines, *TWO, folder=tmp_path / "two")
    train_here(tmp_path / "one", *lines)
    close(tmp_path / "one", tmp_path / "two")
    if loss_norm == "batch":
        zero = {row["frac_reward_zero_std"] for row in comparable(tmp_path / "two")}
        assert "0.5" in zero
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two")]
    assert [s["devices"] for s in summaries] == [1, 2]
    assert summaries[0]["n"] == summaries[1]["n"] == 31, "an odd number of puzzles, each once"
    for name in ("accuracy.before", "accuracy.after", "accuracy.last", "solved.last"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], abs=1e-9)


@pytest.mark.long
def test_the_first_process_alone_writes_and_resuming_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    lines = [*QUICK, *SMALL, *TWO, f"hydra.run.dir={folder}"]
    done = subprocess.run(
        command("tests.faults", "interrupted=2", "spg.train", *lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 130, done.stdout + done.stderr
    assert "stopped after update 2, which is saved" in done.stderr
    assert "Traceback" not in done.stderr
    names = {p.name for p in folder.iterdir()}
    assert names == {".lock", "checkpoints", "config.yaml", "metrics.csv", "status.json", "train.log"}
    assert done.stdout.count("validation: accuracy") == 1, "one process tells"
    text = run("train", f"resume={folder}")
    assert "Going on after update 2" in text
    run("train", *QUICK, *SMALL, folder=tmp_path / "one")
    close(tmp_path / "one", folder)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["other", "first"])
def test_when_one_process_dies_the_others_end(tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "two"
    lines = [*QUICK, *TWO, "trainer.max_updates=4000", "task.eval_size=4", f"hydra.run.dir={folder}"]
    first = subprocess.Popen(
        command("train", *lines), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 90
    while not (folder / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (other,) = children(first.pid, f"resume={folder}")
    os.kill(other if victim == "other" else first.pid, signal.SIGKILL)
    started = time.monotonic()
    _, text = first.communicate(timeout=60)
    while alive(other) and time.monotonic() < started + 60:
        time.sleep(0.1)
    assert not alive(other)
    assert time.monotonic() - started < 60
    if victim == "other":
        assert first.returncode == 1
        name = f"the process of rank 1 (of 2 processes; host {socket.gethostname()}, pid {other})"
        assert f"{name} ended unexpectedly (signal SIGKILL); the others were ended" in text
        assert f"python -m spg.train resume={folder}" in text
        assert "Traceback" not in text
    else:
        assert f"the process of rank 0 (of 2 processes; host {socket.gethostname()}, pid {first.pid})" in text
        assert f"ended unexpectedly; go on with: python -m spg.train resume={folder}" in text
    assert read_status(folder)["state"] == "failed", "who is left writes it"
    assert torch.load(folder / "checkpoints/last.ckpt")["spg"]["updates"] >= 4, "whole"


@pytest.mark.long
def test_an_error_of_the_first_process_is_the_one_that_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    lines = [*QUICK, *TWO, "task.eval_size=4", f"hydra.run.dir={folder}"]
    started = time.monotonic()
    text = run("tests.faults", "fails_at=2", "spg.train", *lines, check=False)
    assert time.monotonic() - started < 60
    assert "ZeroDivisionError: planted" in text
    assert read_status(folder)["error"] == "planted"
    text = run("train", *lines[:-1], f"model.weights={tmp_path / 'none'}", folder=tmp_path / "x", check=False)
    assert "is not a file" in text
    assert "ended unexpectedly" not in text


@pytest.mark.long
def test_jobs_of_a_multirun_with_several_processes_follow_each_other(tmp_path: Path) -> None:
    lines = [*QUICK, *SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1,2"]
    run("train", "--multirun", *lines, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    close(*(tmp_path / "sweep" / f"trainer.devices-{n}" for n in (1, 2)))


def children(parent: int, words: str) -> list[int]:
    """Return the processes that `parent` started with `words` in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, line = (path / "stat").read_text(), (path / "cmdline").read_bytes().decode()
        except OSError:  # it has ended meanwhile
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and words in line:
            found.append(int(path.name))
    return found


def alive(pid: int) -> bool:
    """Return whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_shares_of_an_evaluation_cover_each_item_once(processes: int) -> None:
    """Also where there are more processes than items; each item has its own random stream."""
    policy, task = small_policy(), Sudoku(train_size=8, eval_size=7)
    decoder = Decoder(24, 12, 8, temperature=1.0)
    examples = task.examples("test")
    complete = Completer(policy, decoder, task, seed=5)
    whole = evaluate(complete, task, examples, 3)
    shares: list[list] = []

    class Alone(World):
        """One of several processes, without the others."""

        def gather_items(self, items: Sequence) -> list:
            shares.append(list(items))
            return [("", {"accuracy": 0.0})]

    class Last(World):
        """The process that gets what all have gathered."""

        def gather_items(self, items: Sequence) -> list:
            return [row for share in shares for row in share]

    for rank in range(processes):
        evaluate(complete, task, examples, 2, Alone(rank, processes))
    joined = evaluate(complete, task, examples, 2, Last(0, processes))
    assert joined.texts == whole.texts
    assert joined.measures["accuracy"].tolist() == whole.measures["accuracy"].tolist()


def test_a_run_that_another_number_of_processes_resumes_shares_its_prompts_out(tmp_path: Path) -> None:
    folder = train_here(tmp_path / "run", "trainer.max_updates=4", "task.eval_size=4")
    with pytest.raises(ConfigError, match=r"prompts_per_rollout=16 can't be shared out .* multiple of 3"):
        resume(str(folder), ["trainer.devices=3", "trainer.strategy=ddp", "trainer.max_updates=8"])
    with pytest.raises(ConfigError, match=r"trainer\.devices=2 needs .*trainer\.strategy=ddp with resume"):
        resume(str(folder), ["trainer.devices=2", "trainer.max_updates=8"])
    assert read_status(folder)["state"] == "finished"


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("ddp", 2), ("auto", 1)),
        (("auto", 1), ("ddp", 2)),
        (("ddp", 2), ("ddp", 3)),
        (("ddp", 2), ("fsdp", 2)),
        (("fsdp", 2), ("auto", 1)),
        (("fsdp", 2), ("ddp", 3)),
    ],
)
def test_another_number_of_processes_goes_on_with_the_same_update(
    tmp_path: Path, before: tuple[str, int], after: tuple[str, int]
) -> None:
    """A run that is resumed by more or fewer processes equals one of one process, up to rounding."""
    lines = [*QUICK, *SMALL, "trainer.prompts_per_rollout=6", "trainer.accelerator=cpu"]
    lines += ["trainer.validate_every=2"]
    folder = tmp_path / "several"
    first, second = ([f"trainer.strategy={name}", f"trainer.devices={n}"] for name, n in (before, after))
    run("train", *lines, *first, "trainer.max_updates=2", folder=folder)
    text = run("train", f"resume={folder}", "trainer.max_updates=4", *second)
    assert "Going on after update 2" in text
    words = f"{after[1]} processes go on with the work of {before[1]}: rounding changes"
    assert (words in text) == (before[1] != after[1])
    train_here(tmp_path / "one", *lines)
    close(tmp_path / "one", folder)
