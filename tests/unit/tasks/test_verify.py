"""math-verify in its process: right, bounded, restarted, ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spg.core.errors import RunError
from spg.tasks.parsing import math_verify as module
from spg.tasks.parsing.math_verify import LONGEST, Worker
from tests.helpers import ROOT

HOSTILE = {
    "power": "10^{10^{10}}",
    "factorials": "9!!!!!!!!!",
    "memory": r"\begin{pmatrix}" * 40,
    "braces": "{" * LONGEST,
    "parentheses": "(" * LONGEST,
    "roots": r"\sqrt" * 150,
    "tower": "x^" * 400,
    "surrogate": "\x00\ud800",
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def pid_of(worker: Worker) -> int:
    assert worker._process is not None
    return worker._process.pid


def ended(pid: int, patience: float = 10) -> bool:
    """Return whether a process is gone, or about to be waited for, within `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("18", "18", True),
        ("18", "18 dollars", True),
        ("18", "The answer is $18$.", True),
        ("2125", "2,125", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\frac{2}{4}", True),
        ("3, 5, 7", "5, 3, 7", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\text{(C)}", "C", True),
        ("18", "17", False),
        ("x+1", "y+1", False),
        ("5", "", False),
        ("5", "?", False),
    ],
)
def test_equality(worker: Worker, gold: str, answer: str, same: bool) -> None:
    assert worker.verify(gold, answer) is same


@pytest.mark.parametrize("name", HOSTILE)
def test_any_text_gets_an_answer_in_bounded_time(worker: Worker, name: str) -> None:
    assert worker.verify("1", "1")
    started = time.monotonic()
    assert worker.verify("1", HOSTILE[name], timeout=0.7) is False
    assert time.monotonic() - started < 0.7 + 1 + 1, "the time, the kill, and some for a busy machine"
    assert worker.verify("1", "1"), "it goes on afterwards"


def test_long_answers_are_wrong_at_once(worker: Worker) -> None:
    assert worker.verify("1", "1" + " " * (LONGEST - 1))
    assert not worker.verify("1", "1" + " " * LONGEST)


def test_starting_is_paid_once(worker: Worker) -> None:
    assert worker.verify("1", "1")
    first = pid_of(worker)
    assert not worker.verify("1", "2")
    assert pid_of(worker) == first


def test_killed_from_outside_it_starts_again(worker: Worker) -> None:
    assert worker.verify("1", "1")
    os.kill(pid_of(worker), 9)
    assert ended(pid_of(worker))
    assert not worker.verify("1", "1"), "the comparison that meets it is lost"
    assert worker.verify("1", "1")


def test_an_interruption_loses_no_reply(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.verify("1", "1")
    first = pid_of(worker)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.verify("1", "1")
    monkeypatch.undo()
    assert ended(first), "else its reply would be taken for the next one's"
    assert not worker.verify("1", "2")


def test_threads_take_turns(worker: Worker) -> None:
    results: dict[int, bool] = {}

    def compare(number: int) -> None:
        results[number] = worker.verify("3", f"{number}+1")

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [number for number, same in sorted(results.items()) if same] == [2]


def test_a_worker_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"math-verify's process could not be started"):
        Worker().verify("1", "1")


def test_it_imports_no_torch_and_ends_with_its_parent() -> None:
    """However the parent ends: at its exit, or killed in the middle of a comparison that takes long."""
    script = (
        "import sys, threading, time\n"
        "from spg.tasks.parsing import math_verify as v\n"
        "v.verify('1', '1')\n"
        "print(v._worker._process.pid, 'torch' in sys.modules, flush=True)\n"
        "if len(sys.argv) > 1:\n"
        "    v.verify('1', '10^{10^{10}}', timeout=1.0)\n"
    )
    for arguments in ([], ["busy"]):
        parent = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert parent.stdout is not None
        pid, torch = parent.stdout.readline().split()
        assert torch == "False"
        maps = Path(f"/proc/{pid}/maps").read_text() if arguments else ""
        assert "torch" not in maps
        if arguments:
            parent.kill()
        parent.wait(timeout=20)
        parent.stdout.close()
        assert ended(int(pid))
