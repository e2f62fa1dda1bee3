"""What the jobs of a multirun notice about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spg.core.errors import Interrupted
from spg.runs import watching
from spg.runs.jobs import run_job
from spg.runs.status import write_status
from spg.runs.watching import PARENT, STOPPING


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, and know of no multirun."""
    monkeypatch.setattr(watching, "INTERVAL", 0.02)
    monkeypatch.setenv(PARENT, "")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multirun that was started by a process that is killed, and that nobody has waited for yet."""
    code = "import sys, time\nfrom spg.runs import watching\nimport os\nwatching.note_parent()\n"
    code += "print(os.environ[watching.PARENT], flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    monkeypatch.setenv(PARENT, process.stdout.readline())
    assert not watching.parent_is_gone()
    process.kill()
    deadline = time.monotonic() + 10
    while not watching.parent_is_gone():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()
    process.stdout.close()


@pytest.mark.usefixtures("gone")
def test_if_the_multirun_was_killed_no_job_starts_and_a_running_one_is_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    run_job(tmp_path / "queued", {}, lambda: bool(done.append("queued")))
    assert not done
    assert not (tmp_path / "queued").exists()
    noted = os.environ[PARENT]
    watching.note_parent()
    assert not watching.parent_is_gone()

    def work() -> bool:
        signal.signal(signal.SIGUSR1, lambda *_: done.append("asked"))
        monkeypatch.setenv(PARENT, noted)
        wait_for(lambda: done == ["asked"])
        raise Interrupted("saved")

    run_job(tmp_path / "running", {}, work)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert done == ["asked"]
    assert not (tmp_path / STOPPING).exists(), "the same command may be at work again"


def test_a_process_with_the_number_of_the_multirun_s_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    watching.note_parent()
    number, began = json.loads(os.environ[PARENT])
    assert number == os.getpid()
    monkeypatch.setenv(PARENT, json.dumps([number, f"{began}1"]))
    assert watching.parent_is_gone()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert not watching.parent_is_gone(), "jobs of a cluster do not need it"


def wait_for(what, seconds: float = 10.0) -> None:
    """Wait until `what` returns true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_running_job_is_asked_to_stop_once_when_the_multirun_is_being_stopped(tmp_path: Path) -> None:
    asked: list[int] = []
    with watching.watch(tmp_path):
        (tmp_path / STOPPING).touch()
        time.sleep(0.1)
        assert not asked, "nothing handles the signal yet"
        before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
        try:
            wait_for(lambda: bool(asked))
            time.sleep(0.1)
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert asked == [signal.SIGUSR1]


def test_before_submitit_requeues_a_job_its_work_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    events: list[str] = []

    def requeue(number: int, frame: object) -> None:
        events.append("requeued")
        raise SystemExit(-1)

    def save(number: int, frame: object) -> None:
        events.append("saved")
        raise Interrupted("saved")

    def work() -> bool:
        signal.signal(signal.SIGUSR1, save)
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)
        return False

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit):
            run_job(tmp_path / "job", {}, work)
        assert events == ["saved", "requeued"]
        assert signal.getsignal(signal.SIGUSR2) is requeue
        write_status(tmp_path / "job", state="finished")
        run_job(tmp_path / "job", {}, work)
        assert events == ["saved", "requeued", "saved"], "it was finished just before"
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert not (tmp_path / STOPPING).exists(), "the other jobs go on"
