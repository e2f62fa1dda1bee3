"""The connection between the processes of a run: orders, deaths, silence; without torch, in one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from spg.core import link as link_module
from spg.core import wire
from spg.core.errors import RunError
from spg.core.link import Hub, Link, Member
from spg.core.wire import Wire, greet, ports
from tests.helpers import ROOT


def until(reached: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list]]:
    """Return a function that opens a hub and members; all are closed afterwards, and no process is ended."""
    links: list[Link] = []

    def open_links(size: int = 2) -> list:
        hub = Hub(size, "token", [0], "127.0.0.1")
        found = [hub, *(Member(r, size, "token", "127.0.0.1", [hub.port], 5.0) for r in range(1, size))]
        links.extend(found)
        for one in found:
            one.abort = lambda text: None
            if isinstance(one, Member):
                one.leave = lambda code: None
        until(lambda: len(hub.others) == size - 1)
        return found

    yield open_links
    for one in reversed(links):
        one.end(0)


def test_the_others_get_the_arguments_of_the_first_and_leave(opened: Callable[..., list]) -> None:
    hub, one, two = opened(3)
    hub.tell(arguments=["resume=x"], file="f")
    assert one.orders()["arguments"] == two.orders()["arguments"] == ["resume=x"]
    one.say("ready")
    assert not hub.wait_for("ready", 0.1)
    two.say("ready")
    assert hub.wait_for("ready", 5.0)
    for member in (one, two):
        member.end(0)
    assert hub.wait_for("bye", 5.0)
    time.sleep(0.1)
    assert hub.dead is None


def test_who_comes_late_hears_what_was_said(opened: Callable[..., list]) -> None:
    hub = Hub(2, "token", [0], "127.0.0.1")
    hub.tell(arguments=["a"])
    member = Member(1, 2, "token", "127.0.0.1", [hub.port], 5.0)
    assert member.orders()["arguments"] == ["a"]
    member.end(0)
    hub.end(0)


@pytest.mark.parametrize("code", [0, 2])
def test_if_the_first_one_refuses_the_others_end_with_its_code(
    opened: Callable[..., list], code: int
) -> None:
    """Code 0 without arguments: the user asked for help."""
    hub, member = opened()
    codes: list[int] = []
    member.leave = codes.append
    hub.end(code)
    until(lambda: codes)
    assert codes == [code]


def test_a_failure_is_told_to_all_with_who_failed(opened: Callable[..., list]) -> None:
    hub, one, two = opened(3)
    heard: list[str] = []
    hub.on_death = heard.append
    one.say("failed", "no CUDA device")
    assert two.died.wait(5.0)
    pid = f"host {socket.gethostname()}, pid {os.getpid()}"
    assert two.dead == hub.dead == f"the process of rank 1 (of 3 processes; {pid}) failed: no CUDA device"
    assert heard == [hub.dead]
    hub.lose("another")
    assert hub.dead == heard[0], "what follows from it is not told"


CHILD = """
import sys, time
from spg.core.link import Hub, Member
if sys.argv[1] == "first":
    hub = Hub(2, "token", [0], "127.0.0.1")
    print(hub.port, flush=True)
else:
    member = Member(1, 2, "token", "127.0.0.1", [int(sys.argv[2])])
    print("there", flush=True)
time.sleep(60)
"""


def child(*arguments: str) -> subprocess.Popen[str]:
    """Start a process with one end of a link."""
    line = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_killed_process_is_named_at_once_and_a_stopped_one_is_not_dead(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "QUIET", 0.6)
    monkeypatch.setattr(link_module, "BEAT", 0.2)
    hub = Hub(2, "token", [0], "127.0.0.1")
    hub.abort = lambda text: None
    other = child("other", str(hub.port))
    until(lambda: hub.others, 20.0)
    os.kill(other.pid, signal.SIGSTOP)
    hub.others[1].heard = time.monotonic()
    until(lambda: "is stopped, or its machine hangs" in caplog.text)
    assert hub.dead is None
    os.kill(other.pid, signal.SIGCONT)
    hub.others[1].hear("beat")
    assert "answers again" in caplog.text
    other.kill()
    assert hub.died.wait(5.0)
    assert hub.dead is not None
    assert f"of rank 1 (of 2 processes; host {socket.gethostname()}, pid {other.pid}) ended" in hub.dead
    other.wait()
    hub.end(1)


def test_if_the_first_process_is_killed_the_others_name_it() -> None:
    first = child("first")
    assert first.stdout is not None
    member = Member(1, 2, "token", "127.0.0.1", [int(first.stdout.readline())], 5.0)
    aborted: list[str] = []
    member.abort = aborted.append
    first.kill()
    assert member.died.wait(5.0)
    assert member.dead is not None
    assert "the process of rank 0 (of 2 processes; " in member.dead
    assert not aborted, "it gets time to end by itself"
    member.end(1)
    first.wait()


def test_a_silent_process_ends_the_run_after_a_limit(
    opened: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, _ = opened()
    monkeypatch.setattr(link_module, "SILENCE", 0.3)
    aborted: list[str] = []
    hub.abort = aborted.append
    monkeypatch.setattr(link_module, "BEAT", 100.0)  # no heartbeat comes
    assert hub.died.wait(5.0)
    assert "has been silent for" in str(hub.dead)
    assert not aborted


def test_who_was_asked_to_stop_does_not_wait_long_for_a_silent_process(
    opened: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, member = opened()
    monkeypatch.setattr(link_module, "GRACE", 0.3)
    monkeypatch.setattr(link_module, "BEAT", 100.0)
    time.sleep(0.5)
    assert hub.dead is None
    member.hurry()
    assert hub.died.wait(5.0)
    assert member.died.wait(5.0)


def test_after_the_patience_a_process_that_can_t_go_on_is_ended(opened: Callable[..., list]) -> None:
    hub, _ = opened()
    aborted: list[str] = []
    hub.abort = aborted.append
    hub.lose("gone", patience=0.1)
    until(lambda: aborted)
    assert aborted == ["gone"]


def test_a_process_that_was_stopped_itself_does_not_take_the_others_for_silent(
    opened: Callable[..., list],
) -> None:
    hub, _ = opened()
    hub.others[1].heard -= 1000.0
    hub._checked -= 1000.0
    hub._check(list(hub.others.values()))
    assert hub.dead is None


def test_strangers_and_other_starts_are_not_let_in() -> None:
    hub = Hub(2, "token", [0], "127.0.0.1")
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(b'{"token": "token"}\n')
        assert stranger.recv(100) == b""
    with pytest.raises(RunError, match="rank 1 found no first process of its run at"):
        Member(1, 2, "another start", "127.0.0.1", [hub.port], 0.1)
    assert not hub.others
    assert hub.dead is None
    one = Member(1, 2, "token", "127.0.0.1", [hub.port], 5.0)
    with pytest.raises(RunError, match="found no first process"):
        Member(1, 2, "token", "127.0.0.1", [hub.port], 0.1)
    one.end(0)
    hub.end(0)


def test_ports_follow_from_the_start_and_a_taken_one_is_passed_over() -> None:
    numbers = ports("torchrun/x/0")
    assert numbers == ports("torchrun/x/0")
    assert not set(numbers) & set(ports("torchrun/x/1"))
    assert all(15000 <= number < 32000 for number in numbers)
    first = Hub(2, "one", [0])
    second = Hub(2, "two", [first.port, 0])
    assert second.port != first.port
    member = Member(1, 2, "two", "localhost", [first.port, second.port], 5.0)
    with pytest.raises(RunError, match=f"none of the ports {first.port} is free"):
        Hub(2, "three", [first.port])
    for one in (member, second, first):
        one.end(0)


def test_a_forked_process_does_not_keep_a_connection_open(opened: Callable[..., list]) -> None:
    hub, member = opened()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    member.over.set()
    member.first.wire.close()
    threading.Event().wait(0.01)
    assert hub.died.wait(5.0), "the child holds nothing"
    os.write(go[1], b"x")
    os.waitpid(child, 0)


def test_a_first_process_that_is_busy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts a connection, and answers when it has time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        read, empty = Wire.read, iter([[], []])  # two times nothing within the limit of a read

        def read_later(own: Wire) -> list | None:
            found = next(empty, None)
            return read(own) if found is None else found

        monkeypatch.setattr(Wire, "read", read_later)

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b'{"welcome": "host", "pid": 1}\n')

        threading.Thread(target=answer, daemon=True).start()
        found = greet("127.0.0.1", port, {"token": "t"})
    assert found is not None
    assert found[1] == {"welcome": "host", "pid": 1}
