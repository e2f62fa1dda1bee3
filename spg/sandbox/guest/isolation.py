"""The walls of the cage: its file system, limits of resources, no privileges, a filter of system calls."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import signal
import socket
import struct
import sys
from contextlib import nullcontext, suppress
from typing import Any

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
    """Call a function of the C library; raise OSError if it fails."""
    converted = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*converted) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def wall_in(limits: dict[str, Any]) -> None:
    """Take from this process, and from all that it will start, what a program under test does not need."""
    uid = limits["uid"]
    os.umask(0o022)
    if limits["walls"]:
        replace_root(limits["disk_mb"])
    limit_resources(limits)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    system("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    drop_capabilities()
    # after the change of the user id, which would undo both
    system("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    system("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # its own user id can't reach its memory and files
    with nullcontext() if limits["walls"] else suppress(OSError):
        filter_calls()


def needed_folders() -> list[str]:
    """Return the folders that the interpreter needs to import its standard library."""
    library = os.path.dirname(os.__file__)
    inside = [path for path in sys.path if path.endswith("lib-dynload")]
    own = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    found = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", *own, library, *inside]
    return [path for path in dict.fromkeys(found) if os.path.exists(path)]


def replace_root(disk_mb: int) -> None:
    """Replace the file system by one with the read-only standard library and a small writable /tmp."""
    folders = needed_folders()
    system("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    places = [p for p in ("/mnt", "/srv", "/media", "/sys") if os.path.isdir(p)]
    stage = next(p for p in places if not any(f"{f}/".startswith(f"{p}/") for f in folders))
    system("mount", "cage", stage, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    root = f"{stage}/root"
    # the writable folder comes first, since the interpreter may lie below it
    os.makedirs(f"{root}/tmp")
    writable = f"size={disk_mb}m,nr_inodes=4096,mode=1777"
    system("mount", "cage", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, writable)
    shown: list[str] = []
    for source in [*folders, "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]:
        if os.path.exists(source) and not any(source.startswith(f"{other}/") for other in shown):
            bind_read_only(source, root)
            shown.append(source)
    hide_packages(folders, root)
    system("mount", None, stage, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    os.chdir(stage)
    system("pivot_root", ".", ".")
    system("umount2", ".", MNT_DETACH)
    # below the root of the namespace the kernel grants no further user namespace
    os.chroot("/root")
    os.chdir("/tmp")


def bind_read_only(source: str, root: str) -> None:
    """Make a file or folder visible under `root`, read-only and at its own path."""
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
    # in a user namespace the restrictions of the original mount must be repeated
    kept = os.statvfs(target).f_flag & (MS_NOEXEC | (MS_NODEV if not source.startswith("/dev/") else 0))
    system("mount", None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept, None)


def hide_packages(folders: list[str], root: str) -> None:
    """Hide the packages that are installed beside the standard library."""
    names = ("site-packages", "dist-packages", "python3/dist-packages")
    inside = {os.path.realpath(f"{root}{folder}/{name}") for folder in folders for name in names}
    for folder in inside:
        if folder.startswith(root) and os.path.isdir(folder):
            system("mount", "cage", folder, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=0")


def limit_resources(limits: dict[str, Any]) -> None:
    """Limit what each process may use, and the number of processes."""
    processes = limits["processes"] + 2  # the examiner and the candidate
    if limits["uid"] is None and not (limits["walls"] and newer_than(5, 14)):
        processes += tasks_of(os.getuid())  # the kernel counts them too
    for name, value in {
        "AS": limits["memory_mb"] << 20,
        "CPU": limits["cpu_seconds"],
        "FSIZE": limits["disk_mb"] << 20,
        "NPROC": processes,
        "NOFILE": 64,
        "CORE": 1,  # 0 would still pass a core to a program that collects them
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (allowed, allowed))


def newer_than(*version: int) -> bool:
    """Return whether the kernel has this version or a later one."""
    return tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2]) >= version


def tasks_of(uid: int) -> int:
    """Return the number of threads that a user runs."""
    count = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


def drop_capabilities() -> None:
    """Give up every privilege for good."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails harmlessly if there is none to drop
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    system("capset", header, (ctypes.c_uint32 * 6)())


def filter_calls() -> None:
    """Leave the keyring of the host, and refuse the system calls of `CALLS` and sockets outside `FAMILIES`.

    Do nothing on a machine that `CALLS` does not list, or in an interpreter of 32 bits.
    """
    if os.uname().machine not in CALLS or sys.maxsize < 2**32:
        return
    architecture, keyctl, sockets, refused = CALLS[os.uname().machine]
    libc.syscall(keyctl, KEYCTL_JOIN_SESSION_KEYRING, None)  # if this fails, the filter still holds
    load, equal, above, end = 0x20, 0x15, 0x35, 0x06
    at_family = 6 + len(refused) + len(sockets)
    at_refusal = at_family + 1 + len(FAMILIES)
    refusal = end, SECCOMP_RET_ERRNO | errno.EPERM, 0
    # an instruction, its operand, and the step to go to if the comparison holds (otherwise the next one)
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
