"""Messages between the processes of a run, and signs of life: one end of a connection.

A process that was killed is known at once: its system closes the connection. A machine that is gone is known
after UNREACHABLE seconds, when its system no longer confirms what is sent. A process that is stopped has a
system that confirms; it is named after QUIET seconds without a heartbeat.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from spg.core.errors import RunError

log = logging.getLogger(__name__)

UNREACHABLE = 40  # seconds without confirmation after which a machine is gone
QUIET = 40.0  # seconds without a heartbeat after which a process is named

_LONGEST = 1 << 20  # bytes of a line; more is no message of ours
_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_all() -> None:
    for one in list(_open):
        one.close()


# a forked process would keep the connection of a dead one open
os.register_at_fork(after_in_child=_close_all)


def ports(token: str) -> list[int]:
    """Return the ports that the first process may listen on, in the order in which they are tried.

    They lie below the ports that systems give out by themselves. The token decides them, so that all
    processes of one start know them without asking, and those of other starts try others.
    """
    digests = (hashlib.sha256(f"{token} {i}".encode()).digest() for i in range(8))
    return [15000 + int.from_bytes(digest[:4], "big") % 17000 for digest in digests]


class Wire:
    """One end of a connection over which messages go, each a JSON object on a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._lock = threading.Lock()
        self._rest = b""
        _open.add(connection)
        connection.settimeout(10.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        values = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
        for name, value in {**values, "TCP_USER_TIMEOUT": UNREACHABLE * 1000}.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Send a message; if the other end is gone, reading says so."""
        with self._lock, suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come, after waiting for some bytes; None if the other end is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self.socket.close()


class Other:
    """What a process knows of another one.

    Attributes:
        wire: The connection.
        name: How messages name it.
        heard: When it last gave a sign of life (time.monotonic()).
        said: Kinds of messages that have come from it.
    """

    def __init__(self, wire: Wire, rank: int, size: int, host: str, pid: int) -> None:
        self.wire = wire
        self.rank = rank
        self.name = f"the process of rank {rank} (of {size} processes; host {host}, pid {pid})"
        self.heard = time.monotonic()
        self.said: set[str] = set()
        self._named = False

    def hear(self, kind: str) -> None:
        """Note a message."""
        now = time.monotonic()
        if self._named:
            log.warning("%s answers again, after %.0f s", self.name, now - self.heard)
        self._named = False
        self.heard = now
        self.said.add(kind)

    def problem(self, limit: float) -> str | None:
        """Name the process if it is quiet, and return what is wrong if it is silent for `limit` seconds."""
        silent = time.monotonic() - self.heard
        if silent > limit:
            return f"{self.name} has been silent for {silent:.0f} s"
        if silent > QUIET and not self._named:
            self._named = True
            log.warning(
                "%s has been silent for %.0f s: it is stopped, or its machine hangs; the run ends after "
                "%.0f s",
                self.name,
                silent,
                limit,
            )
        return None


def listen(host: str, candidates: Sequence[int]) -> socket.socket:
    """Listen on the first free port of some.

    Args:
        host: Address to listen on; "" for all of this machine.
        candidates: The ports; 0 for any.

    Raises:
        RunError: if none is free.
    """
    dual = host == "" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    for port in candidates:
        with suppress(OSError):
            listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual, backlog=1024)
            _open.add(listener)
            return listener
    raise RunError(
        f"none of the ports {', '.join(map(str, candidates))} is free for the processes of this run; start "
        "it again"
    )


def greet(
    address: str, port: int, about: Mapping[str, Any]
) -> tuple[Wire, dict[str, Any], list[dict[str, Any]]] | None:
    """Try a port; return the connection, the welcome and further messages if the first process is there."""
    try:
        wire = Wire(socket.create_connection((address, port), timeout=5.0))
    except OSError:
        return None
    wire.send(**about)
    # the first process may be busy for seconds: loading libraries, it holds the interpreter's lock
    messages = next((found for _ in range(6) if (found := wire.read()) != []), [])
    if messages and "welcome" in messages[0]:
        return wire, messages[0], messages[1:]
    wire.close()
    return None
