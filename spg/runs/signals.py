"""Signals that ask a run to stop, and what a scheduler is told then.

Ctrl-C (SIGINT), SIGTERM and SIGUSR1 ask a run to stop. Schedulers send several of them, and the same one
more than once: SLURM sends SIGUSR1 some time before the limit if it is told to (`--signal=USR1@300`) and
SIGTERM at the limit, and `srun` and torchrun pass on what they get. Only a user who presses Ctrl-C again, or
sends SIGTERM again after a while, wants the run to stop at once.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spg.core import link
from spg.core.errors import Interrupted

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# a signal that comes again within so many seconds is the same request, passed on twice
ECHO = {signal.SIGTERM: 5.0, signal.SIGINT: 1.0}
# seconds that a command of SLURM gets to answer
PATIENCE = 60.0


class StopRequest:
    """Notes that a signal asks this process to stop.

    Before training begins there is nothing to save, and the signal raises Interrupted at once. While the run
    trains, it is only noted. At the end, while results are being written, it is noted too.

    Attributes:
        asked: Whether the process was asked to stop.
        by: The first signal that asked, None if none did.
        training: Whether the run trains, so that there is something to save.
        over: Whether the run has stopped and is about to leave.
    """

    def __init__(self) -> None:
        self.asked = False
        self.by: signal.Signals | None = None
        self.training = False
        self.over = False
        self._latest: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle the signals for the time of a `with` block, if this thread is allowed to."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.take_signals()
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def take_signals(self) -> None:
        """Handle the signals again, if another library has taken them inside of `listen`."""
        for number in self._before:
            signal.signal(number, self._handle)

    def join(self, number: int) -> None:
        """Note that another process of the run was asked to stop, by this signal."""
        if not self.asked:
            self.asked, self.by = True, signal.Signals(number)

    def _handle(self, number: int, frame: Any) -> None:
        again = self._is_again(number)
        self._latest.setdefault(number, time.monotonic())
        if self.over:
            return
        if again:
            raise Interrupted("stopped at once")
        if self.asked:
            return
        self.asked, self.by = True, signal.Signals(number)
        if not self.training:
            raise Interrupted("stopped before training began")
        connection = link.current()
        if connection is not None:
            connection.hurry()
        log.info("Stopping when this rollout's updates are done; press Ctrl-C again to stop at once")

    def _is_again(self, number: int) -> bool:
        """Return whether the user repeats what was asked for already, and a launcher does not pass it on."""
        if not self.asked or number not in ECHO:
            return False
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            return True  # the terminal sends it once
        first = self._latest.get(number)
        if first is None:
            return number == signal.SIGINT
        return time.monotonic() - first >= ECHO[signal.Signals(number)]


def requeue(by: signal.Signals | None, environ: Mapping[str, str] = os.environ) -> None:
    """Ask SLURM to put this job into its queue again, and log what came of it.

    A job that its user has cancelled gets SIGTERM too, and is not put back.

    Args:
        by: The signal that stopped the run; only what a scheduler sends counts.
        environ: The environment.
    """
    if by not in (signal.SIGTERM, signal.SIGUSR1):
        return
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        log.warning(
            "trainer.requeue=true: this is no job of SLURM (SLURM_JOB_ID is not set); the run is saved"
        )
        return
    if shutil.which("scontrol", path=environ.get("PATH")) is None:
        log.warning("trainer.requeue=true: there is no command scontrol here; the run is saved")
        return
    if by == signal.SIGTERM and _was_cancelled(job):
        log.info("Job %s was cancelled, and is not requeued; the run is saved", job)
        return
    code, text = _ask("scontrol", "requeue", job)
    if code == 0:
        log.info("Requeued job %s%s", job, f": {text}" if text else "")
    else:
        log.warning("scontrol requeue %s failed (%s); the run is saved", job, text or f"exit code {code}")


def _was_cancelled(job: str) -> bool:
    """Return whether a job ends because its user cancelled it, and not because of its time limit."""
    found = re.search(r"JobState=(\w+)(?: Reason=(\w+))?", _ask("scontrol", "show", "job", job)[1])
    if found is None:
        return False
    # while the tasks of a cancelled job still end, SLURM calls it COMPLETING, as it does at the time limit
    return found[1] == "CANCELLED" or (found[1] == "COMPLETING" and found[2] != "TimeLimit")


def _ask(*command: str) -> tuple[int, str]:
    """Return the exit code of a command, and what it wrote, in one line."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {PATIENCE:.0f} seconds"
    except OSError as error:
        return 1, str(error)
    return done.returncode, " ".join(done.stdout.split())
