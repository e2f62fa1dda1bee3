"""The processes that share a command: the first one works, and the others follow it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from spg.core import link
from spg.core.errors import InputError, RunError, exit_code
from spg.core.files import digest
from spg.core.link import Member
from spg.core.process import Place, check_launcher, place

log = logging.getLogger(__name__)

# seconds in which a file that another machine wrote must be seen
FILE_PATIENCE = 60.0


@contextmanager
def share(command: str, prepare: Callable[[], object] | None) -> Iterator[None]:
    """Connect the processes of a command for the time of a `with` block.

    In a process that is not the first, the block begins when the first one has written the configuration of
    its run, with the arguments that it gave; if it ends before, this process ends with the same exit code.

    Args:
        command: Name of the command, for messages.
        prepare: Imports what the others will need, while they wait; None if one process does the command.

    Raises:
        InputError: if the processes can't share the command.
        RunError: if they don't find each other, or don't see the same files.
    """
    check_launcher(os.environ)
    own = place()
    if own.rank == 0 and not own.shared:
        yield
        return
    if prepare is None:
        _refuse(own, command)
    connection = link.connect(own)
    link.use(connection)
    code = 0
    try:
        if isinstance(connection, Member):
            _follow(connection, prepare)
        yield
    except BaseException as error:
        code = exit_code(error)
        if not isinstance(error, SystemExit):
            tell_first(f"{type(error).__name__}: {error}")
        raise
    finally:
        connection.end(code)
        link.use(None)


def _refuse(own: Place, command: str) -> NoReturn:
    """Refuse a command that one process does; the first one says so.

    Raises:
        InputError: always, in the first process.
    """
    if own.rank == 0:
        raise InputError(
            f"spg.{command} works in one process, and {own.starter} started {own.size}; start it alone: "
            f"python -m spg.{command} ..."
        )
    time.sleep(3.0)  # launchers end all processes when one has ended
    sys.exit(2)


def _follow(connection: Member, prepare: Callable[[], object]) -> None:
    """Wait for the arguments that the first process gives, and take them for those of this one."""
    prepare()
    orders = connection.orders()
    check_same_file(Path(orders["file"]), orders["digests"])
    os.environ.update(orders["environment"])
    sys.argv[1:] = orders["arguments"]


def check_same_file(path: Path, digests: Sequence[str], patience: float = FILE_PATIENCE) -> None:
    """Wait until this process sees a file that the first process wrote.

    Args:
        path: The file.
        digests: SHA-256 of what it may hold.
        patience: Seconds; other machines see a new file later.

    Raises:
        RunError: if the file does not exist, or if it differs from the one that the first process wrote.
    """
    deadline = time.monotonic() + patience
    while True:
        found = digest(path.read_bytes()) if path.is_file() else None
        if found in digests:
            return
        if time.monotonic() > deadline:
            what = "does not exist" if found is None else "is another file"
            raise RunError(
                f"{path} {what} on {socket.gethostname()}, and the first process wrote it: the directory of "
                "a run must be on a file system that all nodes share; give another hydra.run.dir"
            )
        time.sleep(0.2)


def tell_first(text: str) -> bool:
    """Tell the first process why this one fails; return False if this is the first one."""
    connection = link.current()
    if not isinstance(connection, Member):
        return False
    connection.say("failed", text.splitlines()[0][:1000])
    return True


def refuse_several(what: str) -> None:
    """Refuse `what`, which starts its processes itself, in a process of a launcher's.

    Raises:
        InputError: in such a process.
    """
    own = place()
    if own.shared:
        raise InputError(
            f"{what} can't be shared by the {own.size} processes that {own.starter} started: start it alone "
            "(python -m spg.train -m ...), each job then starts its processes itself; on a cluster, let "
            "submitit start the jobs (hydra/launcher=submitit_slurm)"
        )
