"""What runs in the cage: a script of the standard library alone, started by `spg.cage`, never imported.

Three processes. The keeper, outside, builds the cage and clears up behind it. The examiner, inside, runs
the tests; where the kernel gives a process namespace it is its first process, so that its end ends all.
The candidate, inside too, runs the program under test, and a copy of it serves each test. Examiner and
candidate share no memory: calls and values travel over a socket as JSON. So nothing that the program does
to its own interpreter (leaving it, patching builtins, walking frames) reaches a test or the report of it.

Values of the standard data types cross by value. Functions and iterators stay where they are and are
called from afar; so do objects of the program's own classes, but they can do more than that only where
the tests ask for a class by its name. A test of functions is therefore never decided by a method that the
program wrote, such as an `__eq__` that always agrees.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import json
import math
import operator
import os
import re
import resource
import signal
import socket
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

JOB, OUTPUT, REPORT = 0, 1, 3  # file descriptors that the parent hands over

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAPABILITY_VERSION = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def system(name: str, *arguments: Any) -> None:
    """Call a function of the C library; raises OSError where it fails."""
    converted = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*converted) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


# --- the keeper: builds the cage, waits, clears up ---------------------------------------------------


def keep(limits: dict[str, Any]) -> None:
    """Start the examiner in a cage, and end all that it started when it ends, or when told to end."""
    system("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != limits["parent"]:
        return
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    system("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.dup2(limits["report"], REPORT)
    if limits["report"] != REPORT:
        os.close(limits["report"])
    if limits["walls"]:
        identity = os.getuid(), os.getgid()
        inside = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
        system("unshare", inside | (CLONE_NEWUSER if limits["uid"] is None else 0))
        if limits["uid"] is None:
            map_identity(*identity)
    examiner = os.fork()
    if examiner == 0:
        os.setsid()  # out of reach of a signal to the examiner's group
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        guarded(lambda: examine(limits))
    for descriptor in (JOB, OUTPUT, 2, REPORT):
        os.close(descriptor)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while signal.sigwait(signals) == signal.SIGCHLD and os.waitid(os.P_PID, examiner, ended) is None:
        pass  # a child that was only stopped, or one that was inherited
    end_all(examiner, limits["walls"], limits["uid"])


def guarded(work: Callable[[], None]) -> None:
    """Do the work of a child process and end it; what it raises is reported as a broken cage."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent must hear of it
        with suppress(OSError):
            report(broken=f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def map_identity(uid: int, gid: int) -> None:
    """Make the caller's own ids, and no others, known in its new user namespace."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def end_all(examiner: int, walls: bool, uid: int | None) -> None:
    """Kill the examiner and every process that came from it, and wait for them."""
    with suppress(ProcessLookupError):
        os.kill(examiner, signal.SIGKILL)
    if uid is not None and not walls:
        killer = os.fork()
        if killer == 0:
            os.setresuid(uid, uid, uid)
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # every process of that user id, at one moment
            os._exit(0)
        os.waitpid(killer, 0)
    while True:
        # orphans become children of this process, so the list empties in the end
        if not walls:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for child in file.read().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# --- the cage's walls --------------------------------------------------------------------------------


def wall_in(limits: dict[str, Any]) -> None:
    """Take from this process, and so from all it will start, what a program under test needs not."""
    uid = limits["uid"]
    os.umask(0o022)
    if limits["walls"]:
        new_root(limits["disk_mb"])
    limit_resources(limits)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    system("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    drop_capabilities()
    # not before the user id has changed, which would undo both
    system("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    system("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # its memory and files are closed to its own user id


def needed_folders() -> list[str]:
    """Return the folders without which the interpreter can't import its standard library."""
    library = os.path.dirname(os.__file__)
    inside = [path for path in sys.path if path.endswith("lib-dynload")]
    own = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    found = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", *own, library, *inside]
    return [path for path in dict.fromkeys(found) if os.path.exists(path)]


def new_root(disk_mb: int) -> None:
    """Replace the file system by a read-only one of the standard library and a small writable /tmp."""
    folders = needed_folders()
    system("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    places = [p for p in ("/mnt", "/srv", "/media", "/sys") if os.path.isdir(p)]
    stage = next(p for p in places if not any(f"{f}/".startswith(f"{p}/") for f in folders))
    system("mount", "cage", stage, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    root = f"{stage}/root"
    # first the folder that stays writable: the interpreter may live below it
    os.makedirs(f"{root}/tmp")
    writable = f"size={disk_mb}m,nr_inodes=4096,mode=1777"
    system("mount", "cage", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, writable)
    shown: list[str] = []
    for source in [*folders, "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]:
        if os.path.exists(source) and not any(source.startswith(f"{other}/") for other in shown):
            show(source, root)
            shown.append(source)
    hide_packages(folders, root)
    system("mount", None, stage, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    os.chdir(stage)
    system("pivot_root", ".", ".")
    system("umount2", ".", MNT_DETACH)
    # below the namespace's root, where the kernel grants no user namespace of one's own
    os.chroot("/root")
    os.chdir("/tmp")


def show(source: str, root: str) -> None:
    """Make a file or folder visible, read-only and at its own path, under `root`."""
    target = root + source
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    system("mount", source, target, None, MS_BIND | MS_REC, None)
    # in a user namespace a mount's own restrictions must be repeated
    kept = os.statvfs(target).f_flag & (MS_NOEXEC | (MS_NODEV if not source.startswith("/dev/") else 0))
    system("mount", None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept, None)


def hide_packages(folders: list[str], root: str) -> None:
    """Cover what was installed beside the standard library."""
    names = ("site-packages", "dist-packages", "python3/dist-packages")
    inside = {os.path.realpath(f"{root}{folder}/{name}") for folder in folders for name in names}
    for folder in inside:
        if folder.startswith(root) and os.path.isdir(folder):
            system("mount", "cage", folder, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=0")


def limit_resources(limits: dict[str, Any]) -> None:
    """Set the limits that bind each process, and the number of processes."""
    processes = limits["processes"] + 2  # the examiner and the candidate
    if limits["uid"] is None and not (limits["walls"] and newer_than(5, 14)):
        processes += tasks_of(os.getuid())  # which the kernel counts too
    for name, value in {
        "AS": limits["memory_mb"] << 20,
        "CPU": limits["cpu_seconds"],
        "FSIZE": limits["disk_mb"] << 20,
        "NPROC": processes,
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (allowed, allowed))


def newer_than(*version: int) -> bool:
    """Whether the kernel has this version or a later one."""
    return tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2]) >= version


def tasks_of(uid: int) -> int:
    """Return how many threads a user runs."""
    count = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


def drop_capabilities() -> None:
    """Give up every privilege, for good."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # not permitted where there is none to drop
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    system("capset", header, (ctypes.c_uint32 * 6)())


# --- what crosses between examiner and candidate -----------------------------------------------------

CONTAINERS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
# types written as text: their module, and how to write them
TEXTS: dict[str, tuple[str, Callable[[Any], str], str]] = {
    "Decimal": ("decimal", str, "__call__"),
    "Fraction": ("fractions", str, "__call__"),
    "date": ("datetime", lambda value: value.isoformat(), "fromisoformat"),
    "time": ("datetime", lambda value: value.isoformat(), "fromisoformat"),
    "datetime": ("datetime", lambda value: value.isoformat(), "fromisoformat"),
}


def is_builtin_class(value: Any) -> bool:
    """Whether a value is a class that every interpreter has under its own name."""
    return isinstance(value, type) and getattr(builtins, value.__name__, None) is value


def plain_class(value: Any) -> type:
    """Return the class that a value crosses as: a subclass of a plain class counts as that class."""
    for cls in type(value).__mro__:
        if cls in (bool, int, float, complex, str, bytes, bytearray, range, dict, *CONTAINERS.values()):
            return cls
    return type(value)


class Late(BaseException):
    """A test's time is up."""


class Ended(BaseException):
    """The process at the other end is gone."""


class Line:
    """One end of the connection; each request is answered before the next, but may cause some in turn.

    `objects` says whether objects of the other side's own classes can be worked with.
    """

    def __init__(self, connection: socket.socket, trusting: bool) -> None:
        self.file = connection.makefile("rwb")
        self.trusting = trusting  # the candidate does all that it is asked; the examiner only calls back
        self.objects = False
        self.lent: list[Any] = []

    def ask(self, what: str, *values: Any, **named: Any) -> Any:
        """Have the other side apply a function of `operator` or `builtins`; raises what it raises."""
        self.send(["ask", what, self.encode(values), self.encode(named)])
        while True:
            kind, *rest = self.receive()
            if kind == "ask":
                self.serve(*rest)
            elif kind == "value":
                value, after = (self.decode(part) for part in rest)
                for old, new in zip(values, after, strict=False):
                    refresh(old, new)
                return value
            else:
                raise self.error(*rest)

    def serve(self, what: str, values: Any, named: Any) -> None:
        """Answer one request."""
        try:
            if not (self.trusting or what == "call"):
                raise PermissionError(f"{what} is not for the program to ask")
            function = getattr(operator, what, None) or getattr(builtins, what)
            arguments = self.decode(values)
            value = function(*arguments, **self.decode(named))
            answer = ["value", self.encode(value), self.encode(arguments if self.trusting else ())]
        except (Late, Ended):
            raise
        except BaseException as error:  # noqa: BLE001  # whoever asked is to have it
            names = [cls.__name__ for cls in type(error).__mro__ if is_builtin_class(cls)]
            answer = ["error", names, self.encode(tuple(map(self.shown, error.args))), self.lend(error)]
        self.send(answer)

    def serve_all(self) -> None:
        """Answer requests until the other side hangs up."""
        with suppress(Ended):
            while True:
                _, *request = self.receive()
                self.serve(*request)

    def send(self, message: Any) -> None:
        """Write one message; raises Ended where nobody reads it."""
        try:
            self.file.write(json.dumps(message).encode() + b"\n")
            self.file.flush()
        except BrokenPipeError:
            raise Ended from None

    def receive(self) -> Any:
        """Return the next message; raises Ended where none will come."""
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise Ended
        return json.loads(line)

    def shown(self, value: Any) -> Any:
        """Return an argument of an exception as it is, or as a text."""
        return value if isinstance(value, str | int | float) else str(value)

    def lend(self, value: Any) -> list[Any]:
        """Keep a value for the other side and return the handle by which it can speak of it."""
        self.lent.append(value)
        return ["here", len(self.lent) - 1]

    def encode(self, value: Any) -> Any:
        """Return a value as JSON: tagged lists, and handles for what can't be written down."""
        cls = plain_class(value)
        if value is None or cls in (bool, int, float, str):
            return value if value is None else cls(value)
        if cls is dict:
            return ["dict", [[self.encode(k), self.encode(v)] for k, v in value.items()]]
        if cls.__name__ in CONTAINERS and cls is CONTAINERS[cls.__name__]:
            return [cls.__name__, [self.encode(v) for v in value]]
        if cls in (bytes, bytearray):
            return [cls.__name__, value.hex()]
        if cls is complex:
            return ["complex", value.real, value.imag]
        if cls is range:
            return ["range", value.start, value.stop, value.step]
        if cls.__name__ in TEXTS and cls.__module__ == TEXTS[cls.__name__][0]:
            return [cls.__name__, TEXTS[cls.__name__][1](value)]
        if is_builtin_class(value):
            return ["class", value.__name__]
        if isinstance(value, Remote):
            return ["there", value._number]
        if self.trusting or callable(value):
            return self.lend(value)
        raise TypeError(f"a {type(value).__name__} of the tests can't be handed to the program")

    def decode(self, data: Any) -> Any:
        """Return the value of what `encode` wrote; raises TypeError for anything else."""
        if not isinstance(data, list):
            if isinstance(data, dict):
                raise TypeError("unreadable value")
            return data
        kind, *parts = data
        if kind == "dict":
            return {self.decode(k): self.decode(v) for k, v in parts[0]}
        if kind in CONTAINERS:
            return CONTAINERS[kind](self.decode(v) for v in parts[0])
        if kind in ("bytes", "bytearray"):
            return getattr(builtins, kind).fromhex(parts[0])
        if kind in ("complex", "range"):
            return getattr(builtins, kind)(*parts)
        if kind in TEXTS:
            module, _, reader = TEXTS[kind]
            return getattr(getattr(importlib.import_module(module), kind), reader)(parts[0])
        if kind == "class" and is_builtin_class(getattr(builtins, parts[0], None)):
            return getattr(builtins, parts[0])
        if kind == "there":
            return self.lent[parts[0]]
        if kind == "here":
            return (RemoteObject if self.objects else Remote)(self, parts[0])
        raise TypeError("unreadable value")

    def error(self, names: list[str], arguments: Any, handle: Any) -> BaseException:
        """Return the exception that the other side raised, as the nearest builtin class."""
        for name in names:
            cls = getattr(builtins, name, None)
            if isinstance(cls, type) and issubclass(cls, BaseException):
                with suppress(TypeError):  # some can't be made from their arguments
                    error = cls(*self.decode(arguments))
                    error.remote = RemoteObject(self, handle[1])  # type: ignore[attr-defined]
                    return error
        return RuntimeError("the program raised something unknown")


def refresh(old: Any, new: Any) -> None:
    """Give a container that was handed over the contents that the other side left it with."""
    if isinstance(old, list | bytearray) and old != new:
        old[:] = new
    elif isinstance(old, dict | set) and old != new:
        old.clear()
        old.update(new)
    elif isinstance(old, deque) and old != new:
        old.clear()
        old.extend(new)


class Remote:
    """Something on the other side: it can be called and gone through, and is equal to itself alone."""

    _line: Line
    _number: int

    def __init__(self, line: Line, number: int) -> None:
        self.__dict__.update(_line=line, _number=number)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._line.ask("call", self, *values, **named)

    def __iter__(self) -> Iterator[Any]:
        return self._line.ask("iter", self)

    def __next__(self) -> Any:
        return self._line.ask("next", self)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and self._line.ask("isinstance", value, self) is True


class RemoteObject(Remote):
    """An object of a class that the tests know by name: it answers for itself."""

    def __getattr__(self, name: str) -> Any:
        return self._line.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._line.ask("eq", self, other))


def forwarded(function: str) -> Callable[..., Any]:
    """Return a method that has the other side apply a function to the object."""

    def method(self: Remote, *values: Any) -> Any:
        return self._line.ask(function, self, *values)

    return method


def reflected(function: str) -> Callable[..., Any]:
    """Return a method of an operator's right side, likewise."""

    def method(self: Remote, other: Any) -> Any:
        return self._line.ask(function, other, self)

    return method


for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "xor"):
    setattr(RemoteObject, f"__{name}__", forwarded(name))
    setattr(RemoteObject, f"__r{name}__", reflected(name))
for name in ("and", "or"):
    setattr(RemoteObject, f"__{name}__", forwarded(f"{name}_"))
for name in ("lt", "le", "gt", "ge", "neg", "abs", "contains", "getitem", "setitem", "delitem", "pow"):
    setattr(RemoteObject, f"__{name}__", forwarded(name))
for name in ("len", "str", "repr", "bool", "int", "float", "reversed", "round", "format", "hash"):
    setattr(RemoteObject, f"__{name}__", forwarded(name))


# --- the candidate -----------------------------------------------------------------------------------


def stand(control: socket.socket, loading: socket.socket) -> None:
    """Run the program's text, then serve each test by a copy of this process."""
    os.setsid()
    for descriptor in (JOB, REPORT):
        os.close(descriptor)
    os.open("/dev/null", os.O_RDONLY)  # the lowest free number: the standard input
    module = types.ModuleType("solution")
    sys.modules["solution"] = module

    def load(program: str) -> None:
        exec(compile(program, "solution.py", "exec", dont_inherit=True), module.__dict__)

    line = Line(loading, trusting=True)
    line.lent = [load]
    line.serve(*line.receive()[1:])
    copy = 0
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if copy:  # its test is over
            os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)
        if not descriptors:
            return
        copy = os.fork()
        if copy == 0:
            served = Line(socket.socket(fileno=descriptors[0]), trusting=True)
            served.lent = [module]
            served.serve_all()
            return
        os.close(descriptors[0])


# --- the examiner ------------------------------------------------------------------------------------


def report(**facts: Any) -> None:
    """Tell the parent."""
    os.write(REPORT, json.dumps(facts).encode() + b"\n")


def examine(limits: dict[str, Any]) -> None:
    """Wall this process in, start the candidate, run the tests one after the other and report each."""
    os.chdir(limits["folder"])
    wall_in(limits)
    sys.set_int_max_str_digits(0)
    control, control_there = socket.socketpair()
    loading, loading_there = socket.socketpair()
    report(ready=True)  # what goes wrong from here on is the program's doing
    if os.fork() == 0:  # before the job is read: the program never has the tests in its memory
        control.close()
        loading.close()
        try:
            stand(control_there, loading_there)
        finally:
            os._exit(0)
    control_there.close()
    loading_there.close()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the first process inherits orphans
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, ring)
    with os.fdopen(JOB, "rb", closefd=False) as file:
        job = json.load(file)
    end = time.monotonic() + limits["wall_seconds"]
    sys.modules["pytest"] = little_pytest()

    def load() -> None:
        Remote(Line(loading, trusting=False), 0)(job["program"])

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


def ring(*_: object) -> None:
    """End a test whose time is up; the program may send the signal too, before that time."""
    if time.monotonic() >= alarm_at:
        raise Late


def attempt(work: Callable[[], None], seconds: float) -> list[str]:
    """Return how a piece of work ended, and the error's text."""
    global alarm_at
    try:
        try:
            alarm_at = time.monotonic() + seconds
            # once more each second, for a test that catches everything
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3) + 1e-3, 1.0)
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            alarm_at = math.inf
    except Late:
        return ["timeout", ""]
    except Ended:
        return ["killed", "the program's process ended"]
    except MemoryError:
        return ["memory", "MemoryError"]
    except BaseException as error:  # noqa: BLE001  # a test that leaves in any way has failed
        text = f"{type(error).__name__}: {error}"[:300]
        return ["failed", text.encode(errors="replace").decode()]
    return ["passed", ""]


def run_test(control: socket.socket, test: str) -> None:
    """Run a test's text, whose `solution` is a fresh copy of the candidate; raises what the test raises."""
    here, there = socket.socketpair()
    line = Line(here, trusting=False)
    try:
        socket.send_fds(control, [b"."], [there.fileno()])
    except OSError as error:
        raise Ended from error
    finally:
        there.close()
    try:
        sys.modules["solution"] = Solution(line)
        exec(compile(test, "tests.py", "exec", dont_inherit=True), {"__name__": "tests"})
    finally:
        line.file.close()
        here.close()


class Solution(types.ModuleType):
    """The program as a module: its names are asked for when a test does."""

    def __init__(self, line: Line) -> None:
        super().__init__("solution")
        self.__dict__.update(_line=line, _module=RemoteObject(line, 0))

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            # what a test does not name may neither hide a builtin nor bring in a class
            names = self._line.ask("dir", self._module)
            return [n for n in names if n[:1].islower() and not hasattr(builtins, n)]
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            self._line.objects = True
        return self._line.ask("getattr", self._module, name)


# --- as much of pytest as tests of single functions use ----------------------------------------------


class Raises:
    """A block that must raise."""

    def __init__(self, expected: Any, match: str | None = None) -> None:
        self.expected = expected if isinstance(expected, tuple) else (expected,)
        self.match = match
        self.value: BaseException | None = None

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        if error is None:
            raise AssertionError("nothing was raised")
        if isinstance(error, Late | Ended):
            return False
        raised = getattr(error, "remote", error)
        if not any(isinstance(raised if isinstance(cls, Remote) else error, cls) for cls in self.expected):
            return False
        if self.match is not None and not re.search(self.match, str(error)):
            raise AssertionError(f"{str(error)!r} does not match {self.match!r}")
        self.value = error
        return True


class Approx:
    """A number, or a container of numbers, that is equal to what is near it."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self.expected = expected
        self.rel = (0.0 if abs is not None else 1e-6) if rel is None else rel
        self.abs = 1e-12 if abs is None else abs

    def near(self, expected: Any, actual: Any) -> bool:
        """Return whether two values, or the values in two containers, are near each other."""
        if isinstance(expected, dict) and isinstance(actual, dict):
            return expected.keys() == actual.keys() and all(self.near(expected[k], actual[k]) for k in actual)
        if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
            return len(expected) == len(actual) and all(map(self.near, expected, actual))
        try:
            within = max(self.rel * abs(expected), self.abs)
            return bool(expected == actual or (math.isfinite(expected) and abs(expected - actual) <= within))
        except TypeError:
            return bool(expected == actual)

    def __eq__(self, other: object) -> bool:
        return self.near(self.expected, other)

    __hash__ = None  # type: ignore[assignment]


class Marks:
    """Marks of tests: `parametrize` counts, others are remarks."""

    def parametrize(self, names: Any, cases: Any, **_: Any) -> Callable[..., Any]:
        """Return a decorator that notes the arguments that a test is to be called with."""
        listed = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)

        def mark(test: Any) -> Any:
            rows = [case if len(listed) > 1 else (case,) for case in cases]
            test.cases = [
                {**dict(zip(listed, row, strict=True)), **others}
                for row in rows
                for others in getattr(test, "cases", [{}])
            ]
            return test

        return mark

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def mark(*values: Any, **_: Any) -> Any:
            return values[0] if len(values) == 1 and callable(values[0]) else lambda test: test

        return mark


def little_pytest() -> types.ModuleType:
    """Return a module with what `pytest` offers to tests of single functions, and `run`."""
    module = types.ModuleType("pytest")
    fixtures: dict[str, Any] = {}

    def fixture(*functions: Any, **_: Any) -> Any:
        if not functions:
            return fixture
        fixtures[functions[0].__name__] = functions[0]
        return functions[0]

    def supplied(function: Any, known: dict[str, Any]) -> Any:
        code = getattr(function, "__func__", function).__code__
        wanted = [n for n in code.co_varnames[: code.co_argcount] if n in known or n in fixtures]
        return function(**{n: known[n] if n in known else fixture_value(n, known) for n in wanted})

    def fixture_value(name: str, known: dict[str, Any]) -> Any:
        value = supplied(fixtures[name], known)
        return next(value) if isinstance(value, types.GeneratorType) else value

    def run(test: Any) -> None:
        set_up = getattr(getattr(test, "__self__", None), "setup_method", None)
        for case in getattr(test, "cases", [{}]):
            if set_up is not None:
                supplied(set_up, {"method": test})
            supplied(test, case)

    def param(*values: Any, **_: Any) -> Any:
        return values if len(values) > 1 else values[0]

    def fail(reason: str = "") -> None:
        raise AssertionError(reason)

    module.__dict__.update(raises=Raises, approx=Approx, mark=Marks(), fixture=fixture, run=run)
    module.__dict__.update(param=param, fail=fail)
    return module


if __name__ == "__main__":
    guarded(lambda: keep(json.loads(sys.argv[1])))
