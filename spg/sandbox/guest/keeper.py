"""The keeper: the process outside that builds the cage, waits for its end and clears up."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .examiner import examine
from .isolation import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    system,
)
from .parent import JOB, OUTPUT, REPORT, report


def run_keeper(limits: dict[str, Any]) -> None:
    """Start the examiner in a cage. When it ends, or on SIGTERM, end all processes that came from it."""
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
    folder = "/" if limits["walls"] else make_folder(limits["temporary"], limits["uid"])
    examiner = os.fork()
    if examiner == 0:
        os.setsid()  # out of reach of a signal to the examiner's group
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        run_and_exit(lambda: examine(folder, limits))
    for descriptor in (JOB, OUTPUT, 2, REPORT):
        os.close(descriptor)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while signal.sigwait(signals) == signal.SIGCHLD and os.waitid(os.P_PID, examiner, ended) is None:
        pass  # a child that was only stopped, or one that was inherited
    kill_all(examiner, limits["walls"], limits["uid"])
    if not limits["walls"]:
        delete_files(folder, None)
        with suppress(OSError):
            os.rmdir(folder)
        if limits["uid"] is not None:
            for place in {"/tmp", "/var/tmp", "/dev/shm", limits["temporary"]}:
                delete_files(place, limits["uid"])


def run_and_exit(work: Callable[[], None]) -> None:
    """Do the work of this process and end it. Report an exception as a broken cage."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001  # the host must hear of any error
        with suppress(OSError):
            report(broken=f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def map_identity(uid: int, gid: int) -> None:
    """Map the ids of the caller, and no others, into its new user namespace."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def kill_all(examiner: int, walls: bool, uid: int | None) -> None:
    """Kill the examiner and every process that came from it, and wait for their end."""
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


def make_folder(place: str, uid: int | None) -> str:
    """Make a working folder for a cage without a file system of its own."""
    folder = os.path.join(place, f"spg-cage-{os.urandom(8).hex()}")
    os.mkdir(folder, 0o700)
    if uid is not None:
        os.chown(folder, uid, uid)
    return folder


def delete_files(top: str, uid: int | None) -> None:
    """Delete what a user id owns below a folder, or all of it if `uid` is None; follow no symbolic links."""
    folders = [top]
    found = []
    while folders:
        folder = folders.pop()
        with suppress(OSError):
            if uid is None:
                os.chmod(folder, 0o700)
            mode, owner = os.lstat(folder).st_mode, os.lstat(folder).st_uid
            if uid not in (None, owner) and not mode & stat.S_IXOTH:
                continue  # that user id had no access
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                if uid in (None, owner) or mode & stat.S_IWOTH:
                    found.append(entry)
    for entry in reversed(found):
        with suppress(OSError):
            if uid in (None, entry.stat(follow_symlinks=False).st_uid):
                (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
