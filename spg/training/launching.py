"""Several processes of one run on this machine: start the others, watch them, end them.

Lightning finds its environment set and joins the processes to one group (strategy `ddp` or `fsdp`). The
others are started here, as `python -m spg.train resume=<run>`. So each reads the configuration that the first
one wrote, and if one dies, a message says what to do.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch

from spg.core.console import take_over_logging
from spg.core.errors import RunError
from spg.core.memory import keep_freed_memory
from spg.core.process import RANK, rank

# seconds that the others get to end by themselves after one has died
GRACE = 20.0
_NAMES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
_PARENT = "SPG_PARENT"


class Processes:
    """The processes of a run other than this one, for the time of a `with` block.

    In a process that is not the first, and for a count of 1, nothing is started.

    Args:
        arguments: Arguments of `python -m spg.train` for the other processes.
        count: Number of processes of the run, this one included.
        abort: Called with a message if another process dies, after GRACE seconds in which this process may
            have noticed and left the block by itself.

    Raises:
        RunError: if another launcher has started this process as one of several.
    """

    def __init__(self, arguments: Sequence[str], count: int, abort: Callable[[str], None]) -> None:
        self.arguments = arguments
        self.count = count
        self.abort = abort
        self.others: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()

    def __enter__(self) -> Self:
        # Lightning sets these too, for a single process as well: the next run of a multirun starts clean
        self._environment = {name: os.environ.get(name) for name in _NAMES}
        if self.count == 1 or rank() > 0:
            return self
        if "LOCAL_RANK" in os.environ:
            raise RunError(
                "this process was started by torchrun or another launcher (LOCAL_RANK is set), but a run "
                "starts its processes itself: python -m spg.train trainer=ddp trainer.devices=<number>"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        values = ("127.0.0.1", str(port), "0", "0", str(self.count))
        os.environ.update(zip(_NAMES, values, strict=True))
        command = [sys.executable, "-m", "spg.train", *self.arguments]
        for number in range(1, self.count):
            own = {"LOCAL_RANK": str(number), RANK: str(number), _PARENT: str(os.getpid())}
            self.others.append(subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True))
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        died = self._end_others(error)
        if rank() == 0:
            for name, value in self._environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        # torch.distributed raises a RuntimeError if another process is gone
        if died is not None and isinstance(error, RuntimeError):
            raise RunError(f"{died}; the others were ended") from error

    def _end_others(self, error: BaseException | None) -> str | None:
        """Wait for the others, or end them after a failure; return a message if one had died before."""
        died = None
        if isinstance(error, RuntimeError):
            deadline = time.monotonic() + 2.0
            while self.others and died is None and time.monotonic() < deadline:
                time.sleep(0.1)
                died = self._find_dead()
        # after an error in this process they wait for it in vain
        patience = 2.0 if isinstance(error, Exception) and not isinstance(error, RunError) else GRACE
        deadline = time.monotonic() + patience
        for other in self.others:
            try:
                other.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
        return died

    def _find_dead(self) -> str | None:
        """Return a message about a process that ended by a signal or an error, None if there is none."""
        for number, other in enumerate(self.others, start=1):
            code = other.poll()
            if code is not None and code != 0:
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return f"process {number} of {self.count} ended unexpectedly ({how})"
        return None

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            died = self._find_dead()
            if died is not None and not self._over.wait(GRACE):
                for other in self.others:
                    other.kill()
                self.abort(f"{died}; the others were ended")
                return


def prepare_process(threads: int) -> None:
    """Set this process up to train: its log, memory, threads, and its end if the first process ends.

    Args:
        threads: CPU threads that torch uses.
    """
    take_over_logging()
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
        end_with_parent()
    keep_freed_memory()
    torch.set_num_threads(threads)


def end_with_parent() -> None:
    """End this process when the one that started it has ended; a blocked collective would not notice."""
    parent = int(os.environ[_PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.write(2, b"the first process of this run is gone: this one ends\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
