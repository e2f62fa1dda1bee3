"""The examiner: the process that runs the tests and reports how each one ended."""

from __future__ import annotations

import builtins
import json
import math
import os
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any

from .candidate import run_candidate
from .isolation import wall_in
from .mini_pytest import make_pytest
from .parent import JOB, report
from .rpc import Connection, PeerGone, Remote, RemoteObject, TimeUp


def examine(folder: str, limits: dict[str, Any]) -> None:
    """Put this process behind the walls, start the candidate, run the tests in turn and report each."""
    os.chdir(folder)
    wall_in(limits)
    sys.set_int_max_str_digits(0)
    control, control_there = socket.socketpair()
    loading, loading_there = socket.socketpair()
    report(ready=True)  # whatever goes wrong from here on, the program did it
    if os.fork() == 0:  # before the job is read: the program never has the tests in its memory
        control.close()
        loading.close()
        try:
            run_candidate(control_there, loading_there)
        finally:
            os._exit(0)
    control_there.close()
    loading_there.close()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the first process inherits orphans
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, on_alarm)
    with os.fdopen(JOB, "rb", closefd=False) as file:
        job = json.load(file)
    end = time.monotonic() + limits["wall_seconds"]
    sys.modules["pytest"] = make_pytest()

    def load() -> None:
        Remote(Connection(loading, trusting=False), 0)(job["program"])

    outcome = attempt(load, (end - time.monotonic()) / 2)
    report(loaded=outcome)
    if outcome[0] != "passed":
        return
    for number, test in enumerate(job["tests"]):
        left = end - time.monotonic()
        # half of what is left, so that a test that hangs leaves time for those behind it
        share = left if number == len(job["tests"]) - 1 else left / 2
        report(test=number, outcome=attempt(partial(run_test, control, test), share))


alarm_at = math.inf


def on_alarm(*_: object) -> None:
    """End a test if its time is up. The program may send this signal too, before that time."""
    if time.monotonic() >= alarm_at:
        raise TimeUp


def attempt(work: Callable[[], None], seconds: float) -> list[str]:
    """Do a piece of work in at most `seconds`, and return how it ended and the text of its error."""
    global alarm_at
    try:
        try:
            alarm_at = time.monotonic() + seconds
            # repeat the signal each second, for a test that catches everything
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3) + 1e-3, 1.0)
            work()
        except (TimeUp, PeerGone, MemoryError):
            raise
        except BaseException as error:  # noqa: BLE001  # a test has failed if it leaves in any way
            return ["failed", describe(error)]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            alarm_at = math.inf
    except TimeUp:
        return ["timeout", ""]
    except PeerGone:
        return ["killed", "the program's process ended"]
    except MemoryError:
        return ["memory", "MemoryError"]
    return ["passed", ""]


def describe(error: BaseException) -> str:
    """Return the class and the text of an exception. The text may need a process that is gone."""
    try:
        text = f"{type(error).__name__}: {error}"[:300]
    except (TimeUp, PeerGone, MemoryError):
        raise
    except BaseException:  # noqa: BLE001  # the program's object may raise anything
        text = type(error).__name__
    return text.encode(errors="replace").decode()


def run_test(control: socket.socket, test: str) -> None:
    """Run the text of a test, with a new copy of the candidate as `solution`; raise what the test raises."""
    here, there = socket.socketpair()
    connection = Connection(here, trusting=False)
    try:
        socket.send_fds(control, [b"."], [there.fileno()])
    except OSError as error:
        raise PeerGone from error
    finally:
        there.close()
    try:
        sys.modules["solution"] = Solution(connection)
        exec(compile(test, "tests.py", "exec", dont_inherit=True), {"__name__": "tests"})
    finally:
        connection.file.close()
        here.close()


class Solution(types.ModuleType):
    """The program as a module: it asks the candidate for a name when a test does."""

    def __init__(self, connection: Connection) -> None:
        super().__init__("solution")
        self.__dict__.update(_spg_connection=connection, _spg_module=RemoteObject(connection, 0))

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            # names that a test does not spell out may neither hide a builtin nor bring in a class
            names = self._spg_connection.ask("dir", self._spg_module)
            return [n for n in names if n[:1].islower() and not hasattr(builtins, n)]
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._spg_connection.ask("getattr", self._spg_module, name)
        # a name in capitals may be that of a constant, whose methods have no say
        constant = not name[:1].isupper() or (name.isupper() and "_" in name)
        if (
            constant
            or not isinstance(value, Remote)
            or self._spg_connection.ask("isinstance", value, type) is not True
        ):
            return value
        self._spg_connection.objects = True
        return RemoteObject(self._spg_connection, value._spg_number)
