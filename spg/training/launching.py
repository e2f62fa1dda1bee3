"""Several processes of one run on this machine: start the others, watch them, end them.

Lightning finds the environment set and joins the processes to one group (its strategy `ddp`). They are
started here, as `python -m spg.train resume=<run>`, so that each reads the configuration that the first
one wrote, and so that the death of one is told in a line that says what to do.
"""

from __future__ import annotations

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

from spg.core.errors import RunError

# seconds that the others get to end by themselves when one has died
GRACE = 20.0
_NAMES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def rank() -> int:
    """Return this process's number in its run, 0 for the first or only one."""
    return int(os.environ.get("SPG_RANK", "0"))


class Ranks:
    """The other `count - 1` processes of a run, for the time of a `with` block.

    arguments: of `python -m spg.train` for them. When one of them dies, `lost` is called with a line that
    says so, after GRACE seconds in which this process may have noticed and left the block by itself.
    Outside the first process, and for a count of 1, nothing happens. Raises RunError where another
    launcher has started this process as one of several.
    """

    def __init__(self, arguments: Sequence[str], count: int, lost: Callable[[str], None]) -> None:
        self.arguments = arguments
        self.count = count
        self.lost = lost
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
            own = {"LOCAL_RANK": str(number), "SPG_RANK": str(number), "SPG_PARENT": str(os.getpid())}
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
        # what torch.distributed raises where another process is gone
        if died is not None and isinstance(error, RuntimeError):
            raise RunError(f"{died}; the others were ended") from error

    def _end_others(self, error: BaseException | None) -> str | None:
        """Wait for the others, or end them after a failure; return a line about one that died before."""
        died = None
        if isinstance(error, RuntimeError):
            deadline = time.monotonic() + 2.0
            while self.others and died is None and time.monotonic() < deadline:
                time.sleep(0.1)
                died = self.dead()
        # after an error of this process's own they wait for it in vain
        patience = 2.0 if isinstance(error, Exception) and not isinstance(error, RunError) else GRACE
        deadline = time.monotonic() + patience
        for other in self.others:
            try:
                other.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
        return died

    def dead(self) -> str | None:
        """Return a line about a process that ended by a signal or an error, None if there is none."""
        for number, other in enumerate(self.others, start=1):
            code = other.poll()
            if code is not None and code != 0:
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return f"process {number} of {self.count} ended unexpectedly ({how})"
        return None

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            died = self.dead()
            if died is not None and not self._over.wait(GRACE):
                for other in self.others:
                    other.kill()
                self.lost(f"{died}; the others were ended")
                return


def end_with_parent() -> None:
    """End this process when the one that started it is gone, which a blocked collective would not notice."""
    parent = int(os.environ["SPG_PARENT"])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.write(2, b"the first process of this run is gone: this one ends\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
