"""A connection between the processes of a run: who is there, what to do, and who has died.

The first process listens, and each other one holds a connection to it (the standard library's sockets, so
that torch is not needed). Over it goes what the others need to know before they can join the process group:
the arguments of the run, and whether the first process has refused them.

Threads send a heartbeat every few seconds, so that a process counts as alive for as long as it exists, no
matter how long its rollout takes. A killed process is known at once, and a machine that is gone within a
minute (`spg.core.wire`). A process that is stopped ends the run only after SILENCE seconds.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from spg.core.errors import RunError
from spg.core.process import Place
from spg.core.wire import Other, Wire, greet, listen, ports

# set for the processes that a run starts itself: port, number of processes, token
VARIABLE = "SPG_LINK"
BEAT = 5.0  # seconds between two heartbeats
STALLED = 10.0  # seconds without a turn after which this process itself was stopped
SILENCE = 300.0  # seconds without a heartbeat after which the run ends
ARRIVAL = 600.0  # seconds that the processes of a launcher get to find the first one
GRACE = 20.0  # seconds that a process gets to end by itself after another has died


class Link:
    """This process's end of the connections of a run.

    Attributes:
        dead: What happened to a process that died; None if all live.
        died: Set when one has died.
        on_death: Called at once with what happened, in a thread.
        abort: Called with what happened, GRACE seconds later, unless the link is closed by then.
    """

    def __init__(self) -> None:
        self.dead: str | None = None
        self.died = threading.Event()
        self.over = threading.Event()
        self.on_death: Callable[[str], None] = lambda text: None
        self.abort: Callable[[str], None] = lambda text: os._exit(1)
        self._hurried: float | None = None
        self._checked = self._beaten = time.monotonic()
        self._once = threading.Lock()

    def lose(self, text: str, patience: float = GRACE) -> None:
        """Note that a process has died; only the first such note counts."""
        with self._once:
            if self.dead is not None or self.over.is_set():
                return
            self.dead = text
        self.on_death(text)
        self.died.set()

        def end() -> None:
            if not self.over.wait(patience):
                self.abort(text)

        threading.Thread(target=end, daemon=True).start()

    def end(self, code: int) -> None:
        """Leave the others, with the exit code of this process."""
        self.over.set()

    def hurry(self) -> None:
        """Wait no longer than GRACE seconds for a silent process: this one was asked to stop."""
        self._hurried = self._hurried or time.monotonic()

    def _due(self) -> bool:
        """Return whether a heartbeat is due."""
        due = time.monotonic() - self._beaten >= BEAT
        if due:
            self._beaten = time.monotonic()
        return due

    def _check(self, others: Sequence[Other]) -> None:
        """Find a process that is silent for too long."""
        now = time.monotonic()
        late, self._checked = now - self._checked, now
        if late > STALLED:  # this process itself was stopped: what others sent meanwhile is yet to be read
            for other in others:
                other.heard = now
        hurried = self._hurried is not None and now - self._hurried > GRACE
        for other in others:
            problem = other.problem(GRACE if hurried else SILENCE)
            if problem is not None:
                self.lose(problem)


class Hub(Link):
    """The first process's end: it listens, and knows all others.

    Args:
        size: Number of processes, this one included.
        token: What the processes of this start have in common.
        ports: Ports to listen on, of which the first free one is taken; 0 for any.
        host: Address to listen on; "" for all of this machine.

    Raises:
        RunError: if no port is free.
    """

    def __init__(self, size: int, token: str, ports: Sequence[int], host: str = "") -> None:
        super().__init__()
        self.size = size
        self.token = token
        self.others: dict[int, Other] = {}
        self.explain: Callable[[int], str] = lambda rank: ""
        self._listener = listen(host, ports)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._told: list[dict[str, Any]] = []
        self._since: float | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def tell(self, **message: Any) -> None:
        """Send a message to all others, also to those that have yet to come."""
        with self._changed:
            self._told.append(message)
            if "arguments" in message:
                self._since = time.monotonic()
            others = list(self.others.values())
        for other in others:
            other.wire.send(**message)

    def wait_for(self, kind: str, patience: float) -> bool:
        """Wait until all others have sent a message of this kind; return whether they have."""

        def have_all() -> bool:
            said = sum(kind in other.said for other in self.others.values())
            return said == self.size - 1 or self.dead is not None

        with self._changed:
            return self._changed.wait_for(have_all, patience) and self.dead is None

    def end(self, code: int) -> None:
        """Tell the others that this process ends, and with which code; give them a moment to come."""
        if self.over.is_set():
            return
        self.tell(end=code)
        if code:
            self.wait_for("bye", 10.0)
        self.over.set()

    def _serve(self) -> None:
        try:
            while not self.over.is_set():
                for key, _ in self._selector.select(0.5):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                self._look_around()
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def _accept(self) -> None:
        with suppress(OSError):
            wire = Wire(self._listener.accept()[0])
            self._selector.register(wire.socket, selectors.EVENT_READ, wire)

    def _read(self, source: Wire | Other) -> None:
        wire = source.wire if isinstance(source, Other) else source
        messages = wire.read()
        try:
            for message in messages or []:
                source = self._handle(message, source)
        except (KeyError, TypeError, ValueError):  # not a process of this run
            messages = None
        if messages is None:
            self._selector.unregister(wire.socket)
            wire.close()
            if isinstance(source, Other) and "bye" not in source.said:
                self.lose(f"{source.name} ended unexpectedly{self.explain(source.rank)}")

    def _handle(self, message: Mapping[str, Any], source: Wire | Other) -> Wire | Other:
        """Take a message; return who sent it."""
        if isinstance(source, Wire):
            if message.get("token") != self.token:
                raise ValueError("a process of another start")
            if message["rank"] in self.others:
                raise ValueError("a process that is here already, or was")
            other = Other(source, *(message[key] for key in ("rank", "size", "host", "pid")))
            self._selector.modify(source.socket, selectors.EVENT_READ, other)
            source.send(welcome=socket.gethostname(), pid=os.getpid())
            with self._changed:
                self.others[other.rank] = other
                told = list(self._told)
            for line in told:
                source.send(**line)
            source = other
        for kind in message:
            with self._changed:
                source.hear(kind)
                self._changed.notify_all()
        if "hurry" in message:
            self.hurry()
        if "failed" in message:
            patience = GRACE if "ready" in source.said else 2.0
            self.lose(f"{source.name} failed: {message['failed']}", patience)
        return source

    def _look_around(self) -> None:
        others = [other for other in self.others.values() if "bye" not in other.said]
        if self._due():
            for other in others:
                other.wire.send(beat=1)
        self._check(others)
        if self._since is not None and time.monotonic() - self._since > ARRIVAL:
            missing = [str(rank) for rank in range(1, self.size) if rank not in self.others]
            if missing:
                which = f"of rank {', '.join(missing)} (of {self.size} processes)"
                self.lose(f"the process {which} has not come within {ARRIVAL:.0f} s")

    def lose(self, text: str, patience: float = GRACE) -> None:
        """Note that a process has died, and tell the others."""
        super().lose(text, patience)
        if self.dead == text:
            self.tell(dead=text)
        with self._changed:
            self._changed.notify_all()


class Member(Link):
    """The end of a process that is not the first.

    Args:
        rank: Its number.
        size: Number of processes.
        token: What the processes of this start have in common.
        address: Host of the first process.
        ports: Where the first process may listen.
        arrival: Seconds to look for it.

    Raises:
        RunError: if it can't be found.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        token: str,
        address: str,
        ports: Sequence[int],
        arrival: float = ARRIVAL,
    ) -> None:
        super().__init__()
        self.leave: Callable[[int], None] = os._exit  # how this process ends if the first one has
        self._orders: dict[str, Any] | None = None
        self._ordered = threading.Event()
        about = {"token": token, "rank": rank, "size": size, "host": socket.gethostname(), "pid": os.getpid()}
        deadline = time.monotonic() + arrival
        found = None
        while found is None:
            found = next(filter(None, (greet(address, port, about) for port in ports)), None)
            if found is None and time.monotonic() > deadline:
                raise RunError(
                    f"the process of rank {rank} found no first process of its run at {address} (ports "
                    f"{', '.join(map(str, ports))}) within {arrival:.0f} s; do firewalls let them pass?"
                )
            time.sleep(0 if found else 0.2)
        assert found is not None
        wire, welcome, rest = found
        self.first = Other(wire, 0, size, str(welcome["welcome"]), int(welcome["pid"]))
        threading.Thread(target=self._listen, args=(rest,), daemon=True).start()

    def orders(self) -> dict[str, Any]:
        """Wait for the message with the arguments of the run, for as long as it takes."""
        self._ordered.wait()
        assert self._orders is not None
        return self._orders

    def say(self, kind: str, value: Any = 1) -> None:
        """Send a message to the first process."""
        self.first.wire.send(**{kind: value})

    def hurry(self) -> None:
        """Wait no longer than GRACE seconds for a silent process, here and in the first process."""
        super().hurry()
        # in a thread: a signal may have come while this one was sending
        threading.Thread(target=self.say, args=("hurry",), daemon=True).start()

    def end(self, code: int) -> None:
        """Say goodbye: this process ends, and the first one knows why."""
        self.over.set()
        self.say("bye")

    def _listen(self, messages: list[dict[str, Any]] | None) -> None:
        wire = self.first.wire
        wire.socket.settimeout(0.5)
        while not self.over.is_set():
            for message in messages or []:
                self._handle(message)
            if messages is None:
                self.lose(f"{self.first.name} ended unexpectedly")
                return
            if self._due():
                wire.send(beat=1)
            self._check([self.first])
            messages = wire.read()

    def _handle(self, message: Mapping[str, Any]) -> None:
        for kind in message:
            self.first.hear(kind)
        if "arguments" in message:
            self._orders = dict(message)
            self._ordered.set()
        if "dead" in message:
            self.lose(message["dead"])
        if "end" in message:
            waits = self._ordered.is_set() and message["end"] == 0
            self._end(int(message["end"]), GRACE if waits else 2.0 if self._ordered.is_set() else 0.0)

    def _end(self, code: int, patience: float) -> None:
        """End this process with the code of the first one, unless it does so by itself."""
        if patience == 0 or not self.over.wait(patience):
            self.end(code)
            self.leave(code)


def connect(own: Place) -> Link:
    """Return the link of a process that a launcher, or the first process of its run, has started.

    Raises:
        RunError: if the other processes can't be found.
    """
    if own.launcher == "alone":
        port, size, token = os.environ[VARIABLE].split()
        return Member(own.rank, int(size), token, own.address, [int(port)])
    if own.rank == 0:
        return Hub(own.size, own.token, ports(own.token))
    return Member(own.rank, own.size, own.token, own.address, ports(own.token))


_current: Link | None = None


def current() -> Link | None:
    """Return the link of this process; None if it is the only one of its run."""
    return _current


def use(link: Link | None) -> None:
    """Make a link the one of this process."""
    global _current
    _current = link


def leave() -> None:
    """Tell the first process that this one ends as it should."""
    if _current is not None:
        _current.end(0)
