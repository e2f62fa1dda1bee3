"""Signals that ask a run to stop, and what SLURM is told."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

from spg.core.errors import Interrupted
from spg.runs import signals
from spg.runs.signals import StopRequest, requeue

NAMES = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def send(*numbers: int) -> None:
    """Send signals to this process, which handles each before the next one."""
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NAMES)
def test_before_training_a_signal_ends_the_run_at_once(number: signal.Signals) -> None:
    stop, before = StopRequest(), signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped before training began"), stop.listen():
        send(number)
    assert (stop.asked, stop.by) == (True, number)
    assert signal.getsignal(number) is before, "the signal is given back"


@pytest.mark.parametrize(
    "repeated",
    [
        (signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_what_a_scheduler_repeats_is_one_request(repeated: tuple[signal.Signals, ...]) -> None:
    stop = StopRequest()
    stop.training = True
    with stop.listen():
        send(*repeated)
    assert (stop.asked, stop.by) == (True, repeated[0])


def test_what_a_user_repeats_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for first, second in ((signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)):
        stop = StopRequest()
        stop.training = True
        with stop.listen():
            send(first)
            with pytest.raises(Interrupted, match="stopped at once"):
                send(second)
    stop, clock = StopRequest(), [0.0]
    stop.training = True
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with stop.listen():
        send(signal.SIGTERM, signal.SIGTERM)
        clock[0] = 6.0
        with pytest.raises(Interrupted, match="stopped at once"):
            send(signal.SIGTERM)
        stop.over = True
        send(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def test_torchrun_passes_on_what_the_terminal_sends_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop, clock = StopRequest(), [0.0]
    stop.training = True
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with stop.listen():
        send(signal.SIGINT, signal.SIGINT)
        clock[0] = 2.0
        with pytest.raises(Interrupted, match="stopped at once"):
            send(signal.SIGINT)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a job of SLURM with a `scontrol` that notes how it is called, in the file `calls`."""
    script = tmp_path / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncat {tmp_path}/answer 2>/dev/null\n'
        f"[ ! -e {tmp_path}/fails ]\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path


def told(caplog: pytest.LogCaptureFixture) -> str:
    """Return what was logged, and forget it."""
    (record,) = caplog.records
    text = f"{record.levelname} {record.getMessage()}"
    caplog.clear()
    return text


def test_slurm_is_asked_to_requeue(slurm: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    requeue(signal.SIGUSR1)
    assert told(caplog) == "INFO Requeued job 17"
    assert (slurm / "calls").read_text() == "requeue 17\n"
    (slurm / "answer").write_text("JobId=17 JobState=RUNNING Reason=None\n")
    requeue(signal.SIGTERM)
    assert told(caplog).startswith("INFO Requeued job 17: JobId=17")
    assert (slurm / "calls").read_text().splitlines()[1:] == ["show job 17", "requeue 17"]
    (slurm / "answer").write_text("Requested operation is presently disabled\n")
    (slurm / "fails").touch()
    requeue(signal.SIGUSR1)
    assert told(caplog) == (
        "WARNING scontrol requeue 17 failed (Requested operation is presently disabled); the run is saved"
    )


def test_a_cancelled_job_and_ctrl_c_are_not_requeued(slurm: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (slurm / "answer").write_text("JobId=17 JobState=CANCELLED Reason=None\n")
    requeue(signal.SIGTERM)
    assert told(caplog) == "INFO Job 17 was cancelled, and is not requeued; the run is saved"
    requeue(signal.SIGINT)
    requeue(None)
    assert (slurm / "calls").read_text() == "show job 17\n"
    caplog.clear()
    (slurm / "answer").write_text("JobId=17 JobName=spg\n   JobState=COMPLETING Reason=None Dependency=\n")
    requeue(signal.SIGTERM)
    assert "Job 17 was cancelled" in told(caplog), "its tasks still end"
    (slurm / "answer").write_text("JobId=17 JobName=spg\n   JobState=COMPLETING Reason=TimeLimit\n")
    requeue(signal.SIGTERM)
    assert "requeue 17" in (slurm / "calls").read_text(), "time was up"


def test_without_slurm_there_is_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue(signal.SIGUSR1)
    assert "this is no job of SLURM (SLURM_JOB_ID is not set); the run is saved" in told(caplog)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue(signal.SIGUSR1)
    assert "there is no command scontrol here; the run is saved" in told(caplog)
