"""What a job of a multirun notices about the multirun: that it is being stopped, or that it is gone.

The process of a multirun that starts its jobs on this machine notes itself in the environment. If it is
killed, its jobs save and stop, and queued ones do not start. Jobs that submitit starts go on without it, as
jobs of a cluster do.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spg.core.errors import Interrupted

log = logging.getLogger(__name__)

# file in the directory of a multirun that is being stopped: no other job starts
STOPPING = "stopping"
# how the jobs learn which process started them: its number and when it began
PARENT = "SPG_MULTIRUN"
# seconds between two looks
INTERVAL = 1.0


def note_parent() -> None:
    """Note in the environment that this process starts the jobs of a multirun."""
    os.environ[PARENT] = json.dumps([os.getpid(), _began(os.getpid())])


def parent_is_gone() -> bool:
    """Return whether the process that started this job has ended; False if none is noted."""
    noted = os.environ.get(PARENT)
    if not noted or is_elsewhere():
        return False
    number, began = json.loads(noted)
    if began is None:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        return False
    return _began(number) != began


def _began(number: int) -> str | None:
    """Return when a process began, in the kernel's units; None if it has ended or /proc does not say."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold spaces
    return None if fields[0] in "ZX" else fields[19]


def is_elsewhere() -> bool:
    """Return whether submitit has started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


def ask_to_stop() -> bool:
    """Let the work of this process save and stop; return False if nothing here handles the signal yet."""
    if not callable(signal.getsignal(signal.SIGUSR1)):
        return False
    os.kill(os.getpid(), signal.SIGUSR1)
    return True


@contextmanager
def watch(folder: Path) -> Iterator[None]:
    """Ask the work in a `with` block to stop if the multirun in `folder` is being stopped, or is gone."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(INTERVAL):
            if ((folder / STOPPING).exists() or parent_is_gone()) and ask_to_stop():
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def requeue_at_time_limit(is_done: Callable[[], bool]) -> Iterator[None]:
    """Let the work in a `with` block save when submitit's signal comes; afterwards submitit requeues the job.

    SLURM sends that signal some time before the limit of the job (hydra.launcher.signal_delay_s). Submitit
    itself would requeue at once, and the work since the last checkpoint would be lost.

    Args:
        is_done: Returns whether nothing is left to do.
    """
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", signal.SIGUSR2)
    original = signal.getsignal(number)
    main = threading.current_thread() is threading.main_thread()
    if not (is_elsewhere() and callable(original) and main):
        yield
        return
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        if not ask_to_stop():
            raise Interrupted("stopped before training began")

    signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, original)
        if asked and not is_done():
            try:
                original(number, None)  # ends this process
            except Exception as error:  # noqa: BLE001  # of submitit, or of scontrol
                log.warning("Not requeued: %s", error)
