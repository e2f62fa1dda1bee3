"""Run a program against unit tests in a cage, so that it can neither do harm nor fake a success.

What the cage guarantees depends on what the kernel grants: namespaces with an unused user id (as root), or
a user namespace (as any user). This is tried once. If neither works, no program runs, unless the user asks
for less: `isolation=user_id` (only an unused user id) or `isolation=none`. The code inside the cage is
`spg.sandbox.guest`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import pwd
import secrets
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spg.core.errors import InputError

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("guest") / "__main__.py"
NAMESPACES, USER, UID, NONE = "namespaces", "user namespace", "user id", "none"
# for each setting, the strongest level first; levels without walls must be asked for
LEVELS = {"auto": (NAMESPACES, USER), "user_id": (UID,), "none": (NONE,)}
# seconds beyond the wall-clock limit until a silent cage is ended from outside
GRACE = 5.0
TAIL = 2000  # characters of the output that are kept

# whether `guest.isolation.CALLS` knows the numbers of the system calls of this machine
FILTERED = platform.machine() in ("x86_64", "aarch64") and sys.maxsize > 2**32
_WALLS = (
    "The program sees the system's libraries (/lib, /usr/lib) and the interpreter's lib folder without "
    "installed packages, all read-only, and a /tmp of its own, empty at first and deleted at the end. "
    "It sees no other file, no /proc, no environment and no other process.",
    "It has no network, not even the local one.",
    "It runs as {who} without privileges and can't get any.",
    "When the run ends, fails or is killed, the kernel ends every process that came from it.",
    "It may not use shared memory, memory files, keyrings, tracing and sockets of unusual kinds. Its memory "
    "in all is at most the limit times the number of processes."
    if FILTERED
    else "On this kind of machine NO system calls are refused to it: shared memory and memory files escape "
    "the limit of memory, and it may use keyrings and sockets of unusual kinds.",
)
_LIMITS = (
    "Wall-clock time and the amount of output are limited; so are CPU time, memory and the size of a file "
    "for each process.",
)
_COUNT = ("The number of processes is limited.",)
_NO_WALLS = (
    "The program has no environment, but it can read every file that {who} may read, and write where that "
    "user may write, /tmp and /dev/shm included, as long as there is space.",
    "The network is NOT closed to it.",
)
GUARANTEES: dict[str, tuple[str, ...]] = {
    NAMESPACES: tuple(w.format(who="a user id that nobody else has") for w in _WALLS) + _LIMITS + _COUNT,
    USER: (
        *(w.format(who="the caller's user id in a user namespace of its own,") for w in _WALLS),
        *_LIMITS,
        "The number of processes is limited (before Linux 5.14 together with the user's others).",
    ),
    UID: (
        *(w.format(who="a user id that nobody else has") for w in _NO_WALLS),
        "When the run ends, every process of that user id is killed, and its files in /tmp, /var/tmp and "
        "/dev/shm are deleted.",
        *_LIMITS,
        *_COUNT,
    ),
    NONE: (
        *(w.format(who="the user who runs this") for w in _NO_WALLS),
        "When the run ends, its descendants are killed, unless they have killed the process that does so.",
        *_LIMITS,
        "The number of processes is limited together with the user's others; for root it is not.",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How a run in the cage ended.

    Attributes:
        kind: `passed` if every test passed, else how the first other one ended: `failed`, `timeout`,
            `memory`, `killed` (its process died) or `output` (it printed too much).
        passed: Whether each test passed.
        error: The error of the first test that did not pass.
        seconds: Duration of the run.
        output: The last characters that were printed.
    """

    kind: str
    passed: tuple[bool, ...]
    error: str
    seconds: float
    output: str


def _limits(
    wall_seconds: float, cpu_seconds: int | None, memory_mb: int, processes: int, disk_mb: int
) -> dict[str, Any]:
    return {
        "wall_seconds": wall_seconds,
        "cpu_seconds": int(wall_seconds) + 1 if cpu_seconds is None else cpu_seconds,
        "memory_mb": memory_mb,
        "processes": processes,
        "disk_mb": disk_mb,
    }


class CageError(Exception):
    """The cage could not be built; the message says why."""


class Cage:
    """Runs programs within limits, from any thread.

    Args:
        wall_seconds: Limit of a run; one test may take half of the time that is left.
        cpu_seconds: Limit of each process; None is a second more than wall_seconds.
        memory_mb: Limit of each process.
        processes: Largest number of processes.
        output_bytes: Limit of the output.
        disk_mb: Size of the temporary folder.
        isolation: `auto` takes the strongest walls that work on this machine. `user_id` and `none` have no
            walls, and a warning in the log says so.
        workers: Number of programs to run at the same time; 0 is one for each CPU.

    Raises:
        InputError: if the isolation does not work on this machine.
    """

    def __init__(
        self,
        wall_seconds: float = 8.0,
        cpu_seconds: int | None = None,
        memory_mb: int = 1024,
        processes: int = 16,
        output_bytes: int = 1 << 20,
        disk_mb: int = 16,
        isolation: str = "auto",
        workers: int = 0,
    ) -> None:
        self.limits = _limits(wall_seconds, cpu_seconds, memory_mb, processes, disk_mb)
        self.output_bytes = output_bytes
        self.level = NONE if isolation == "none" else best_level(isolation)
        self.workers = workers or os.cpu_count() or 1
        self._free = threading.BoundedSemaphore(self.workers)
        if self.level in (UID, NONE) and self.level not in _warned:
            _warned.add(self.level)
            log.warning("isolation=%s: %s", isolation, " ".join(self.guarantees()))

    def guarantees(self) -> tuple[str, ...]:
        """Return what this cage guarantees, in sentences."""
        return GUARANTEES[self.level]

    def run(self, program: str, tests: Sequence[str] = ("import solution",)) -> Outcome:
        """Run the text of a program, then the text of each test, which imports it as the module `solution`.

        A test passes if it runs to its end without an exception. Each test gets its own copy of the program
        as it was after loading; if loading failed, all tests fail. All tests share /tmp.

        Raises:
            RuntimeError: if the cage itself breaks.
        """
        with self._free:
            try:
                return _run(program, tests, self.level, self.limits, self.output_bytes)
            except CageError as error:
                raise RuntimeError(
                    f"the cage ({self.level}) broke, which is not a verdict: {error}"
                ) from None


_best: dict[str, str] = {}
_warned: set[str] = set()
_asking = threading.Lock()

# what must be impossible in a cage with walls
_PROBE = f"""
import ctypes, fractions, socket
def opens():
    try:
        open({str(SCRIPT)!r}).close()
    except OSError:
        return False
    return True
def connects():
    try:
        socket.socket(40, socket.SOCK_STREAM).close()  # AF_VSOCK, known to no network namespace
    except OSError:
        return False
    return True
def shares():
    return ctypes.CDLL(None).shmget(0, 4096, 0o1600) != -1
"""
_HOLES = ("opens", "connects", "shares") if FILTERED else ("opens",)


def best_level(isolation: str = "auto") -> str:
    """Return the strongest level of an isolation that works here; raise InputError if none does."""
    with _asking:
        if isolation not in _best:
            _best[isolation] = _find_level(isolation)
        return _best[isolation]


def _find_level(isolation: str) -> str:
    reasons = []
    for level in LEVELS[isolation]:
        # the kernel does not limit the number of processes of root, so root must take another user id
        if (level == USER) == (os.geteuid() == 0):
            reasons.append(f"{level}: {'not ' if level == USER else 'only '}for root")
            continue
        tests = ["import solution"]
        if level != UID:
            tests += [f"import solution\nassert not solution.{hole}(), '{hole}'" for hole in _HOLES]
        try:
            outcome = _run(_PROBE, tests, level, _limits(8.0, None, 1024, 16, 16), 1 << 16)
        except CageError as error:
            reasons.append(f"{level}: {error}")
            continue
        if outcome.kind == "passed":
            return level
        reasons.append(f"{level}: {outcome.kind} {outcome.error} {outcome.output}".strip())
    raise InputError(
        f"programs can't be walled in here ({'; '.join(reasons)}), so none is run. Allow user "
        "namespaces (sysctl user.max_user_namespaces above 0, kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0), or in a container grant CAP_SYS_ADMIN to root. "
        "You may also ask for less: task.isolation=user_id, as root, keeps a program from your processes "
        "and private files, but not from the network and /tmp; with task.isolation=none it can do all you can"
    )


def find_unused_id() -> int:
    """Return a mapped user id that nobody has; raise CageError if there is none."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(ranges, key=lambda r: r[2])
    last = min(first + count, 2**31)  # larger ids are unusual, and negative to some programs
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {65534}
    free = range(first + (last - first) // 2, last)
    for _ in range(100):
        if len(free) > 1 and (found := free[secrets.randbelow(len(free))]) not in taken:
            return found
    raise CageError("no user id is free")


def _run(
    program: str, tests: Sequence[str], level: str, limits: dict[str, Any], output_bytes: int
) -> Outcome:
    started = time.monotonic()
    try:
        plan = {
            **limits,
            "walls": level in (NAMESPACES, USER),
            "uid": find_unused_id() if level in (NAMESPACES, UID) else None,
            "parent": os.getpid(),
            "temporary": tempfile.gettempdir(),
        }
        with tempfile.TemporaryFile() as job:
            job.write(json.dumps({"program": program, "tests": list(tests)}).encode())
            job.seek(0)
            seen = _watch(plan, job.fileno(), output_bytes)
    except OSError as short:  # too few descriptors, processes or bytes
        raise CageError(f"{type(short).__name__}: {short}") from short
    facts = [json.loads(line) for line in seen.reports.splitlines()]
    printed = seen.output.decode(errors="replace")[-TAIL:]
    if {"ready": True} not in facts:
        raise CageError(facts[0]["broken"] if facts else f"it ended without a word; it printed: {printed}")
    # if the program did not load, each test fails; a test without a report was cut off
    loaded: list[str] = next(
        (fact["loaded"] for fact in facts if "loaded" in fact), [seen.cut or "killed", ""]
    )
    ends = [[seen.cut or "killed", ""] if loaded[0] == "passed" else loaded] * len(tests)
    for fact in facts:
        if "test" in fact:
            ends[fact["test"]] = fact["outcome"]
    kind, error = next((end for end in [loaded, *ends] if end[0] != "passed"), ["passed", ""])
    passed = tuple(end[0] == "passed" for end in ends)
    return Outcome(kind, passed, error, time.monotonic() - started, printed)


@dataclass
class _Seen:
    """What came out of a cage. `cut` says why it was ended from outside, or is empty."""

    reports: bytes = b""
    output: bytes = b""
    cut: str = ""


def _watch(plan: dict[str, Any], job: int, output_bytes: int) -> _Seen:
    """Start a cage and read what it writes until it ends, prints too much or is late."""
    seen = _Seen()
    here, low = os.pipe()
    # above 2, since the child replaces the standard descriptors, even if the parent has closed its own
    try:
        there = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError:
        os.close(here)
        raise
    finally:
        os.close(low)
    # with a fixed hash seed, the sets of a program have the same order in each run
    options = ["-s", "-S", "-P", "-u", "-X", "utf8"]
    command = [os.path.realpath(sys.executable), *options, str(SCRIPT)]
    try:
        process = subprocess.Popen(
            [*command, json.dumps({**plan, "report": there})],
            stdin=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(there,),
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
    except BaseException:
        os.close(here)
        raise
    finally:
        os.close(there)
    deadline = time.monotonic() + plan["wall_seconds"] + GRACE
    try:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(here, selectors.EVENT_READ, "reports")
            selector.register(process.stdout, selectors.EVENT_READ, "output")
            while here in {key.fd for key in selector.get_map().values()} and not seen.cut:
                for key, _ in selector.select(timeout=max(deadline - time.monotonic(), 0)):
                    block = os.read(key.fd, 1 << 16)
                    setattr(seen, key.data, getattr(seen, key.data) + block)
                    if not block:
                        selector.unregister(key.fileobj)
                if len(seen.output) > output_bytes:
                    seen.cut = "output"
                elif time.monotonic() > deadline:
                    seen.cut = "timeout"
    finally:
        process.terminate()  # the keeper then ends all other processes
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        os.close(here)
    return seen
