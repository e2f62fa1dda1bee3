"""The candidate: the process that runs the program under test, and from which a copy serves each test."""

from __future__ import annotations

import os
import signal
import socket
import sys
import types

from .parent import JOB, REPORT
from .rpc import Connection


def run_candidate(control: socket.socket, loading: socket.socket) -> None:
    """Run the text of the program, then let a copy of this process serve each test.

    Args:
        control: Receives the end of a new connection for each test.
        loading: The connection over which the text of the program comes.
    """
    os.setsid()
    for descriptor in (JOB, REPORT):
        os.close(descriptor)
    os.open("/dev/null", os.O_RDONLY)  # the lowest free number: the standard input
    module = types.ModuleType("solution")
    sys.modules["solution"] = module

    def load(program: str) -> None:
        exec(compile(program, "solution.py", "exec", dont_inherit=True), module.__dict__)

    connection = Connection(loading, trusting=True)
    connection.lent = [load]
    connection.serve(*connection.receive()[1:])
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
            served = Connection(socket.socket(fileno=descriptors[0]), trusting=True)
            served.lent = [module]
            served.serve_all()
            return
        os.close(descriptors[0])
