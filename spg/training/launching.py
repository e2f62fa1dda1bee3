"""Several processes of one run: start the others if no launcher has, watch them, end them.

Lightning finds its environment set and joins the processes to one group (strategy `ddp` or `fsdp`). Under
torchrun and SLURM they exist already. Otherwise they are started here, as `python -m spg.train resume=<run>`.
In all three cases they are connected (`spg.core.link`), read the configuration that the first one wrote, and
name a process that dies.

Lightning's own launcher is not used. It runs this process's command line again, so that each process would
compose a configuration of its own, and it knows nothing of a run that goes on, or of one in a multirun.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch
from omegaconf import OmegaConf

from spg.core import link
from spg.core.console import take_over_logging
from spg.core.errors import RunError, exit_code
from spg.core.files import digest
from spg.core.link import GRACE, Hub, Member
from spg.core.memory import keep_freed_memory
from spg.core.process import RANK, place, rank
from spg.runs.lifecycle import Run
from spg.runs.status import record_death, write_status

# what Lightning reads, or sets itself
_NAMES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")


class Processes:
    """The processes of a run other than this one, for the time of a `with` block.

    If the run has one process, nothing happens. In a process that is not the first, the block only says that
    it is ready.

    Args:
        run: The run.
        arguments: Arguments of `python -m spg.train` for the other processes.
        count: Number of processes of the run, this one included.
    """

    def __init__(self, run: Run, arguments: Sequence[str], count: int) -> None:
        self.run = run
        self.arguments = list(arguments)
        self.count = count
        self.others: dict[int, subprocess.Popen[bytes]] = {}
        self._hub: Hub | None = None
        self._unlisten: Callable[[], object] = lambda: None
        self._watch(link.current())  # processes that a launcher started may die before the block begins

    def __enter__(self) -> Self:
        # Lightning sets these too, for a single process as well: the next run of a multirun starts clean
        self._environment = {name: os.environ.get(name) for name in _NAMES}
        if self.count == 1:
            return self
        # else Lightning would give each process its share of the machine's cores instead of trainer.threads
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        connection = link.current()
        if isinstance(connection, Member):
            connection.say("ready")
            return self
        self._hub = connection if isinstance(connection, Hub) else self._start()
        environment = {}
        if place().launcher != "alone":
            # Two steps of a SLURM job would take the same port. torchrun keeps its store when it starts all
            # processes again, and a process might find the addresses of those that are gone there.
            environment = {"MASTER_PORT": str(_free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
            os.environ.update(environment)
        file = self.run.folder / "config.yaml"
        # this process writes the changes of a run that goes on when the others have read the file, or before
        contents = (file.read_bytes(), OmegaConf.to_yaml(self.run.cfg, resolve=True).encode())
        self._hub.tell(
            file=str(file.absolute()),
            digests=[digest(content) for content in contents],
            arguments=self.arguments,
            environment=environment,
        )
        return self

    def _start(self) -> Hub:
        """Start the other processes on this machine."""
        token = secrets.token_hex(8)
        hub = Hub(self.count, token, [0], "127.0.0.1")
        hub.explain = self._explain
        values = ("127.0.0.1", str(_free_port()), "0", "0", str(self.count))
        os.environ.update(zip(_NAMES, values, strict=False))
        command = [sys.executable, "-m", "spg.train", *self.arguments]
        for number in range(1, self.count):
            own = {
                "LOCAL_RANK": str(number),
                RANK: str(number),
                link.VARIABLE: f"{hub.port} {self.count} {token}",
            }
            self.others[number] = subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True)
        link.use(hub)
        self._watch(hub)
        threading.Thread(target=self._watch_starts, args=(hub,), daemon=True).start()
        return hub

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        died = None
        self._unlisten()
        if self._hub is not None:
            died = self._end_others(self._hub, error)
        if rank() == 0:
            for name, value in self._environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        # torch.distributed raises a RuntimeError if another process is gone
        if died is not None and isinstance(error, RuntimeError):
            raise RunError(f"{died}; the others were ended") from error

    def _end_others(self, hub: Hub, error: BaseException | None) -> str | None:
        """Wait for the others, or end them after a failure; return a message if one had died before."""
        if isinstance(error, RuntimeError):
            hub.died.wait(5.0)
        # after an error in this process they wait for it in vain
        patience = 2.0 if isinstance(error, Exception) and not isinstance(error, RunError) else GRACE
        deadline = time.monotonic() + patience
        if error is None:
            hub.wait_for("bye", patience)
        if not self.others:
            return hub.dead  # their launcher ends them, or `Hub.end` when this process ends
        hub.end(0 if error is None else exit_code(error))
        for other in self.others.values():
            try:
                other.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
        link.use(None)
        return hub.dead

    def _explain(self, number: int) -> str:
        """Return how a process that this one started has ended."""
        try:
            code = self.others[number].wait(2.0)
        except subprocess.TimeoutExpired:
            return ""
        return f" (signal {signal.Signals(-code).name})" if code < 0 else f" (exit code {code})"

    def _watch_starts(self, hub: Hub) -> None:
        """Name a process that dies before it has connected."""
        while not hub.over.wait(1.0) and not hub.died.is_set():
            for number, other in self.others.items():
                if other.poll() not in (None, 0) and number not in hub.others:
                    hub.lose(f"the process of rank {number} ended unexpectedly{self._explain(number)}")

    def _watch(self, connection: link.Link | None) -> None:
        """Let this process say what happened to another one, and end if it can't go on."""
        if connection is not None:
            connection.on_death, connection.abort = self._notice, self._abort
            self._unlisten = listen_to_signals(connection)

    def _notice(self, text: str) -> None:
        """Write at once what happened, since a launcher may end this process soon; say it on each node."""
        folder = self.run.folder
        if rank() == 0:
            write_status(folder, state="failed", error=text)
        elif record_death(folder, text) or place().local_rank == 0:
            self._say(text)

    def _abort(self, text: str) -> None:
        for other in self.others.values():
            other.kill()
        if rank() == 0:
            self._say(f"{text}; the others were ended")
        os._exit(1)

    def _say(self, text: str) -> None:
        command = place().command(f"resume={self.run.folder}")
        os.write(2, f"{text}; go on with: {command}\n".encode())


def listen_to_signals(connection: link.Link) -> Callable[[], object]:
    """Let a link hear of signals at once; handlers wait for as long as an exchange of torch's blocks.

    Args:
        connection: The link of this process.

    Returns:
        What ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    reading, writing = socket.socketpair()
    for side in (reading, writing):
        side.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while not connection.over.wait(0.5):
            with suppress(BlockingIOError):
                if set(reading.recv(4096)) & {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}:
                    connection.hurry()
        reading.close()

    threading.Thread(target=listen, daemon=True).start()

    def end() -> None:
        signal.set_wakeup_fd(before)
        writing.close()

    return end


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def prepare_process(threads: int) -> None:
    """Set this process up to train: its log, memory and threads.

    Args:
        threads: CPU threads that torch uses.
    """
    take_over_logging()
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
    keep_freed_memory()
    torch.set_num_threads(threads)
