"""What runs in the cage: a script of the standard library alone, started by `spg.sandbox.host`,
never imported.

Three processes. The keeper, outside, builds the cage and clears up behind it. The examiner, inside, runs
the tests; where the kernel gives a process namespace it is its first process, so that its end ends all.
The candidate, inside too, runs the program under test, and a copy of it serves each test. Examiner and
candidate share no memory: calls and values travel over a socket as JSON. So nothing that the program does
to its own interpreter (leaving it, patching builtins, walking frames) reaches a test or the report of it.

Values of the standard data types cross by value, and containers that a call changed are changed here too.
Functions and iterators stay where they are and are called from afar; so do objects of the program's own
classes, but they can do more than that only where the tests ask for a class by its name. A test of
functions is therefore never decided by a method that the program wrote, such as an `__eq__` that always
agrees. The program, for its part, may only call what a test handed to it, and sends nothing but values.

What a test can't do: hand over objects of its own classes or open files; ask `isinstance(x, tuple)` of an
object whose class the program wrote, or reach the attributes of a function; send into a generator.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import importlib
import json
import math
import operator
import os
import re
import resource
import signal
import socket
import stat
import struct
import sys
import time
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from typing import Any

JOB, OUTPUT, REPORT = 0, 1, 3  # file descriptors that the parent hands over

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAPABILITY_VERSION = 0x20080522
KEYCTL_JOIN_SESSION_KEYRING, SECCOMP_MODE_FILTER, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = (
    1,
    2,
    0x50000,
    0x7FFF0000,
)

# by machine: its name in a filter, keyctl, socket and socketpair, and the calls that are refused
# fmt: off
CALLS: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 250, (41, 53), (
        29, 64, 68, 319, 447,  # shmget, semget, msgget, memfd_create, memfd_secret: uncounted memory
        248, 249, 250,  # add_key, request_key, keyctl
        101, 310, 311, 298,  # ptrace, process_vm_readv, process_vm_writev, perf_event_open
        321, 323, 425,  # bpf, userfaultfd, io_uring_setup
    )),
    "aarch64": (0xC00000B7, 219, (198, 199), (
        194, 190, 186, 279, 447, 217, 218, 219, 117, 270, 271, 241, 280, 282, 425,  # in the same order
    )),
}
# fmt: on
# a socket of any other family, such as AF_VSOCK, may lead out of the network namespace
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)

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
    folder = "/" if limits["walls"] else new_folder(limits["temporary"], limits["uid"])
    examiner = os.fork()
    if examiner == 0:
        os.setsid()  # out of reach of a signal to the examiner's group
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        guarded(lambda: examine(folder, limits))
    for descriptor in (JOB, OUTPUT, 2, REPORT):
        os.close(descriptor)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while signal.sigwait(signals) == signal.SIGCHLD and os.waitid(os.P_PID, examiner, ended) is None:
        pass  # a child that was only stopped, or one that was inherited
    end_all(examiner, limits["walls"], limits["uid"])
    if not limits["walls"]:
        sweep(folder, None)
        with suppress(OSError):
            os.rmdir(folder)
        if limits["uid"] is not None:
            for place in {"/tmp", "/var/tmp", "/dev/shm", limits["temporary"]}:
                sweep(place, limits["uid"])


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


def new_folder(place: str, uid: int | None) -> str:
    """Make a working folder for a cage that does not bring its own."""
    folder = os.path.join(place, f"spg-cage-{os.urandom(8).hex()}")
    os.mkdir(folder, 0o700)
    if uid is not None:
        os.chown(folder, uid, uid)
    return folder


def sweep(top: str, uid: int | None) -> None:
    """Delete what a user id owns below a folder, or all of it; symbolic links are not followed."""
    folders = [top]
    found = []
    while folders:
        folder = folders.pop()
        with suppress(OSError):
            if uid is None:
                os.chmod(folder, 0o700)
            mode, owner = os.lstat(folder).st_mode, os.lstat(folder).st_uid
            if uid not in (None, owner) and not mode & stat.S_IXOTH:
                continue  # that user id can't have been there
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                if uid in (None, owner) or mode & stat.S_IWOTH:
                    found.append(entry)
    for entry in reversed(found):
        with suppress(OSError):
            if uid in (None, entry.stat(follow_symlinks=False).st_uid):
                (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)


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
    with nullcontext() if limits["walls"] else suppress(OSError):
        close_calls()


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
        "CORE": 1,  # 0 would let a core through to a program that collects them
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


def close_calls() -> None:
    """Leave the parent's keyring, and refuse the calls of `CALLS` and the sockets not of `FAMILIES`.

    Does nothing on a machine that is not listed there, or to an interpreter of 32 bits.
    """
    if os.uname().machine not in CALLS or sys.maxsize < 2**32:
        return
    architecture, keyctl, sockets, refused = CALLS[os.uname().machine]
    libc.syscall(keyctl, KEYCTL_JOIN_SESSION_KEYRING, None)  # where this fails, the filter still holds
    load, equal, above, end = 0x20, 0x15, 0x35, 0x06
    at_family = 6 + len(refused) + len(sockets)
    at_refusal = at_family + 1 + len(FAMILIES)
    refusal = end, SECCOMP_RET_ERRNO | errno.EPERM, 0
    # an instruction, its operand, and where it jumps to if that holds; otherwise the next one follows
    steps = [
        (load, 4, 0),  # the architecture: the calls of 32 bits have other numbers
        (equal, architecture, 3),
        refusal,
        (load, 0, 0),  # the call's number; those of x32 are large
        (above, 0x40000000, at_refusal),
        *((equal, number, at_refusal) for number in refused),
        *((equal, number, at_family) for number in sockets),
        (end, SECCOMP_RET_ALLOW, 0),
        (load, 16, 0),  # the call's first argument
        *((equal, int(family), at_refusal + 1) for family in FAMILIES),
        refusal,
        (end, SECCOMP_RET_ALLOW, 0),
    ]
    jumps = enumerate(steps)
    packed = [
        struct.pack("HBBI", code, to - n - 1 if to else 0, 0, operand) for n, (code, operand, to) in jumps
    ]
    program = ctypes.create_string_buffer(b"".join(packed))
    system(
        "prctl",
        PR_SET_SECCOMP,
        SECCOMP_MODE_FILTER,
        struct.pack("@HP", len(steps), ctypes.addressof(program)),
    )


# --- what crosses between examiner and candidate -----------------------------------------------------

CONTAINERS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}
MUTABLE = (list, set, deque, dict, OrderedDict, Counter, bytearray)
PLAIN = (bool, int, float, complex, str, bytes, bytearray, range, *CONTAINERS.values())
VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# other types: their module, how to write them as plain arguments, and what reads these
OTHERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "Decimal": ("decimal", lambda value: [str(value)], "__call__"),
    "Fraction": ("fractions", lambda value: [str(value)], "__call__"),
    "date": ("datetime", lambda value: [value.isoformat()], "fromisoformat"),
    "time": ("datetime", lambda value: [value.isoformat()], "fromisoformat"),
    "datetime": ("datetime", lambda value: [value.isoformat()], "fromisoformat"),
    "timedelta": ("datetime", lambda value: [value.days, value.seconds, value.microseconds], "__call__"),
    "array": ("array", lambda value: [value.typecode, value.tolist()], "__call__"),
    "slice": ("builtins", lambda value: [value.start, value.stop, value.step], "__call__"),
    "PosixPath": ("pathlib", lambda value: [str(value)], "__call__"),
}
# what is asked for beside the functions of `operator` and `builtins`
OWN: dict[str, Callable[..., Any]] = {
    "take": lambda iterator, count: list(islice(iterator, count)),
    "plain": lambda value: value,
}


def is_builtin_class(value: Any) -> bool:
    """Whether a value is a class that every interpreter has under its own name."""
    return isinstance(value, type) and getattr(builtins, value.__name__, None) is value


def makes_values(value: Any) -> bool:
    """Whether a value is a class that can make nothing but plain values and exceptions.

    Any other, `type` above all, in the hands of the program would put objects of its own beside the tests.
    """
    return value in PLAIN or (is_builtin_class(value) and issubclass(value, BaseException))


def plain_class(value: Any) -> type:
    """Return the class that a value crosses as: a subclass of a plain class counts as that class."""
    return next((cls for cls in type(value).__mro__ if cls in PLAIN), type(value))


def contents(container: Any) -> Any:
    """Return what a changeable container holds as something that can't be changed."""
    if isinstance(container, bytearray):
        return bytes(container)
    return tuple(container.items() if isinstance(container, dict) else container)


def refill(container: Any, held: Any) -> None:
    """Replace what a changeable container holds by what `contents` returned of another one."""
    container.clear()
    if isinstance(container, dict):
        container.update(dict(held))  # a Counter would add up pairs
    elif isinstance(container, set):
        container.update(held)
    else:
        container.extend(held)


class Late(BaseException):
    """A test's time is up."""


class Ended(BaseException):
    """The process at the other end is gone."""


class Line:
    """One end of the connection; each request is answered before the next, but may cause some in turn.

    Within a request and its answer each changeable container has a number, so that it stays one and the
    same, and is changed where it was lent from. `objects` says whether objects of the program's own classes
    can be worked with, which only the examiner decides.
    """

    def __init__(self, connection: socket.socket, trusting: bool) -> None:
        self.file = connection.makefile("rwb")
        self.trusting = trusting  # the candidate does all that it is asked; the examiner only calls back
        self.objects = False
        self.lent: list[Any] = []
        self.numbers: dict[int, int] = {}  # of what is lent, by its id
        self.remotes: dict[int, Remote] = {}

    def ask(self, what: str, *values: Any, **named: Any) -> Any:
        """Have the other side apply a function of `operator`, `builtins` or `OWN`; raises what it raises."""
        seen: dict[int, tuple[int, Any]] = {}
        objects = self.objects and what != "plain"
        self.send(["ask", what, self.encode(values, seen), self.encode(named, seen), objects])
        while True:
            kind, *rest = self.receive()
            if kind == "ask":
                self.serve(*rest)
                continue
            *answer, changed = rest
            made = [container for _, container in seen.values()]
            for number, held in changed:
                refill(made[number], self.decode(held, made))
            if kind == "value":
                return self.decode(answer[0], made)
            raise self.error(made, *answer)

    def serve(self, what: str, values: Any, named: Any, objects: bool) -> None:
        """Answer one request."""
        made: list[Any] = []
        before: list[str] = []

        def answer(kind: str, *parts: Any) -> list[Any]:
            self.objects = objects if self.trusting else self.objects  # the call may have asked back
            seen = {id(container): (n, container) for n, container in enumerate(made)}
            after = [self.encode(contents(container), seen) for container in made[: len(before)]]
            changed = [[n, held] for n, held in enumerate(after) if json.dumps(held) != before[n]]
            return [kind, *(self.encode(part, seen) for part in parts), changed]

        try:
            if not self.trusting and (what, values[0], values[1][0][0]) != ("call", "tuple", "there"):
                raise PermissionError("a program may only call what a test handed to it")
            function = OWN.get(what) or getattr(operator, what, None) or getattr(builtins, what)
            arguments, options = self.decode(values, made), self.decode(named, made)
            seen = {id(container): (n, container) for n, container in enumerate(made)}
            before = [json.dumps(self.encode(contents(container), seen)) for container in made]
            message = answer("value", function(*arguments, **options))
        except (Late, Ended):
            raise
        except BaseException as error:  # noqa: BLE001  # whoever asked is to have it
            names = tuple(cls.__name__ for cls in type(error).__mro__ if is_builtin_class(cls))
            message = answer("error", names, self.shown(error.args), error if self.trusting else None)
        self.send(message)

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
        if type(value) is tuple:
            return tuple(map(self.shown, value))
        return value if value is None or isinstance(value, str | int | float) else str(value)

    def lend(self, value: Any) -> list[Any]:
        """Keep a value for the other side and return the handle by which it can speak of it."""
        number = self.numbers.setdefault(id(value), len(self.lent))
        if number == len(self.lent):
            self.lent.append(value)
        return ["here", number]

    def encode(self, value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
        """Return a value as JSON: tagged lists, and handles for what can't be written down.

        seen: the changeable containers so far, by id, each with its number.
        """
        cls = plain_class(value)
        if self.trusting and self.objects and type(value).__module__ == "solution":
            return self.lend(value)
        if cls is str:
            return str.__str__(value)
        if value is None or cls in (bool, int, float):
            return value if value is None else cls(value)
        if cls in MUTABLE and id(value) in seen:
            return ["same", seen[id(value)][0]]
        if cls in MUTABLE:
            seen[id(value)] = len(seen), value
            return [cls.__name__, self.encode(contents(value), seen)]
        if cls in CONTAINERS.values():
            return [cls.__name__, [self.encode(v, seen) for v in value]]
        if cls is bytes:
            return ["bytes", value.hex()]
        if cls is complex:
            return ["complex", value.real, value.imag]
        if cls is range:
            return ["range", value.start, value.stop, value.step]
        if isinstance(value, VIEWS):
            view = next(v.__name__ for v in VIEWS if isinstance(value, v))
            return [view, self.encode(contents(dict(value.mapping)), seen)]
        if cls.__name__ in OTHERS and cls.__module__ == OTHERS[cls.__name__][0]:
            return [cls.__name__, *OTHERS[cls.__name__][1](value)]
        if is_builtin_class(value):
            return ["class", value.__name__]
        if isinstance(value, Remote):
            return ["there", value._number]
        if not self.trusting and isinstance(value, Iterator):
            return ["iterator", self.lend(value.__next__)]
        if self.trusting or callable(value):
            return self.lend(value)
        raise TypeError(f"a {type(value).__name__} of the tests can't be handed to the program")

    def decode(self, data: Any, made: list[Any]) -> Any:
        """Return the value of what `encode` wrote; raises TypeError for anything else."""
        if not isinstance(data, list):
            if isinstance(data, dict):
                raise TypeError("unreadable value")
            return data
        kind, *parts = data
        if kind == "same":
            return made[parts[0]]
        if kind in ("tuple", "frozenset"):
            return CONTAINERS[kind](self.decode(v, made) for v in parts[0])
        if kind in CONTAINERS or kind == "bytearray":
            container = CONTAINERS.get(kind, bytearray)()
            made.append(container)
            refill(container, self.decode(parts[0], made))
            return container
        if kind == "bytes":
            return bytes.fromhex(parts[0])
        if kind in ("complex", "range"):
            return getattr(builtins, kind)(*parts)
        if kind in ("dict_keys", "dict_values", "dict_items"):
            return getattr(dict(self.decode(parts[0], made)), kind[5:])()
        if kind in OTHERS:
            module, _, reader = OTHERS[kind]
            return getattr(getattr(importlib.import_module(module), kind), reader)(*parts)
        if kind == "class":
            value = getattr(builtins, parts[0], None)
            if self.trusting or makes_values(value):
                return value
        if kind == "there":
            return self.lent[parts[0]]
        if kind == "here":
            remote = self.remotes.get(parts[0])
            cls = RemoteObject if self.objects and not self.trusting else Remote
            if type(remote) is not cls:
                remote = self.remotes[parts[0]] = cls(self, parts[0])
            return remote
        if kind == "iterator" and self.trusting:
            return iter(self.decode(parts[0], made), object())  # which ends with StopIteration
        raise TypeError("unreadable value")

    def error(self, made: list[Any], names: Any, arguments: Any, handle: Any) -> BaseException:
        """Return the exception that the other side raised, as the nearest builtin class."""
        for name in self.decode(names, made):
            cls = getattr(builtins, name, None)
            if isinstance(cls, type) and issubclass(cls, BaseException):
                with suppress(TypeError):  # some can't be made from their arguments
                    error = cls(*self.decode(arguments, made))
                    if not self.trusting:
                        error.remote = RemoteObject(self, handle[1])  # type: ignore[attr-defined]
                    return error
        return RuntimeError("the program raised something unknown")


class Remote:
    """Something on the other side: it can be called and gone through, and is equal to itself alone."""

    _line: Line
    _number: int

    def __init__(self, line: Line, number: int) -> None:
        self.__dict__.update(_line=line, _number=number)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._line.ask("call", self, *values, **named)

    def __iter__(self) -> Iterator[Any]:
        iterator, taken = self._line.ask("iter", self), 0
        # the more was taken, the more is fetched at once
        while block := self._line.ask("take", iterator, max(1, taken // 4)):
            taken += len(block)
            yield from block

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
        if isinstance(other, Remote):
            return bool(self._line.ask("eq", self, other))
        # a plain value never hears the object's own opinion, but what it is as a tuple, dict, ...
        plain = self._line.ask("plain", self)
        return not isinstance(plain, Remote) and bool(plain == other)


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


def examine(folder: str, limits: dict[str, Any]) -> None:
    """Wall this process in, start the candidate, run the tests one after the other and report each."""
    os.chdir(folder)
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
        except (Late, Ended, MemoryError):
            raise
        except BaseException as error:  # noqa: BLE001  # a test that leaves in any way has failed
            return ["failed", described(error)]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            alarm_at = math.inf
    except Late:
        return ["timeout", ""]
    except Ended:
        return ["killed", "the program's process ended"]
    except MemoryError:
        return ["memory", "MemoryError"]
    return ["passed", ""]


def described(error: BaseException) -> str:
    """Return an exception's class and text, which may need an object of the program that is gone."""
    try:
        text = f"{type(error).__name__}: {error}"[:300]
    except (Late, Ended, MemoryError):
        raise
    except BaseException:  # noqa: BLE001  # the program's object may raise anything
        text = type(error).__name__
    return text.encode(errors="replace").decode()


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
        value = self._line.ask("getattr", self._module, name)
        # a name in capitals may be a constant's, which nobody asks for an opinion
        constant = not name[:1].isupper() or (name.isupper() and "_" in name)
        if constant or not isinstance(value, Remote) or self._line.ask("isinstance", value, type) is not True:
            return value
        self._line.objects = True
        return RemoteObject(self._line, value._number)


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
        cases = getattr(test, "cases", [{}])
        if not cases:
            raise AssertionError("it is parametrized with nothing")
        for case in cases:
            if set_up is not None:
                supplied(set_up, {"method": test})
            supplied(test, case)

    def raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> Raises:
        block = Raises(expected, match)
        if call:
            with block:
                call[0](*call[1:], **named)
        return block

    def param(*values: Any, **_: Any) -> Any:
        return values if len(values) > 1 else values[0]

    def fail(reason: str = "") -> None:
        raise AssertionError(reason)

    module.__dict__.update(raises=raises, approx=Approx, mark=Marks(), fixture=fixture, run=run)
    module.__dict__.update(param=param, fail=fail)
    return module


if __name__ == "__main__":
    guarded(lambda: keep(json.loads(sys.argv[1])))
