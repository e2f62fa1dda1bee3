"""Equality of mathematical answers by math-verify, in a process of its own that can be killed.

SymPy takes as long and as much memory as a text makes it (10^{10^{10}}), and holds the interpreter while it
does. So a worker compares, one pair at a time; it is started at the first comparison, started anew where one
took too long or too much, and ends with this process. Run as a script, this file is that worker, which
imports nothing else of the package.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

TIMEOUT = 5.0  # seconds for a comparison; real ones take milliseconds
PATIENCE = 120.0  # seconds for the worker to start, on a busy machine
LONGEST = 1000  # characters of an answer that is looked at; right ones have far fewer
MEMORY = 2 * 2**30  # bytes of address space for the worker
READY, RIGHT, WRONG = "ready", "right", "wrong"

# words: more than a symbol's letters, and no LaTeX
WORDS = re.compile(r"[A-Za-z]{3}")


class Worker:
    """A process that compares answers; one comparison at a time, from whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def verify(self, gold: str, answer: str, timeout: float = TIMEOUT) -> bool:
        """Return whether `answer` is worth `gold`, False where that takes more than `timeout` seconds.

        Answers of more than LONGEST characters are wrong. The first call waits for the worker to start;
        raises RunError where it can't.
        """
        if max(len(gold), len(answer)) > LONGEST:
            return False
        with self._lock:
            # a forked process has its parent's worker in its memory, but must not talk to it
            if self._process is None or self._owner != os.getpid():
                self._process, self._owner = _started(), os.getpid()
            reply = None
            try:
                request = json.dumps({"gold": gold, "answer": answer, "timeout": timeout})
                reply = _exchange(self._process, request, timeout + 1)
            finally:
                # after an interruption too: the reply to come must not be taken for the next one's
                if reply is None:
                    self._end()
            return reply == RIGHT

    def close(self) -> None:
        """End the process, if there is one; the next comparison starts another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _started() -> subprocess.Popen[bytes]:
    """Start a worker and wait until it is ready; raises RunError where it does not get that far."""
    process = subprocess.Popen(
        # -P keeps this file's folder, whose modules are no top-level ones, from the worker's path
        [sys.executable, "-P", str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        # the order of SymPy's terms, and so its way to a result, depends on hashes
        env={**os.environ, "PYTHONHASHSEED": "0"},
        # not to be reached by Ctrl-C, which asks a run to stop only after the update at hand
        start_new_session=True,
    )
    reply = _exchange(process, "", PATIENCE)
    if reply != READY:
        from spg.core.errors import RunError  # not at the top, where the worker would need it too

        process.kill()
        process.communicate()
        raise RunError(
            f"math-verify's process could not be started: {reply or 'it ended, or took too long'}; "
            "check that `python -c 'import math_verify'` works, or choose another task.parser and task.reward"
        )
    return process


def _exchange(process: subprocess.Popen[bytes], request: str, timeout: float) -> str | None:
    """Send a line and return the line that comes back, None where none comes in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    received = b""
    try:
        process.stdin.write(request.encode() + b"\n")
    except BrokenPipeError:
        return None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return None
            chunk = process.stdout.read(4096)
            if not chunk:
                return None
            received += chunk
    return received.decode().strip()


_worker = Worker()
atexit.register(_worker.close)


def verify(gold: str, answer: str, timeout: float = TIMEOUT) -> bool:
    """Return whether math-verify holds `answer` to be worth `gold`; see `Worker.verify`."""
    return _worker.verify(gold, answer, timeout)


def _serve() -> None:
    """Answer requests from standard input until it ends, as the worker."""
    # a library that prints must not write into the replies
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # past its time a comparison ends the process, wherever it is, even if nobody is there to kill it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _same("1", "1")
        status = READY
    except Exception as error:  # noqa: BLE001  # whatever it is, the other side tells the user
        status = " ".join(f"{type(error).__name__}: {error}".split())
    for line in sys.stdin:
        if line.strip():
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["timeout"])
            status = RIGHT if _same(request["gold"], request["answer"]) else WRONG
            signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(f"{status}\n")
        replies.flush()


def _same(gold: str, answer: str) -> bool:
    from math_verify import verify as same

    return same(_read(gold), _read(answer), timeout_seconds=None)


def _read(answer: str) -> list[object]:
    """Return what math-verify reads in an answer: as text where it has words or dollars, else as LaTeX."""
    from math_verify import parse

    as_latex = f"${answer}$"
    in_words = "\\" not in answer and ("$" in answer or WORDS.search(answer))
    readings = (answer, as_latex) if in_words else (as_latex, answer)
    return parse(readings[0], parsing_timeout=None) or parse(readings[1], parsing_timeout=None)


if __name__ == "__main__":
    _serve()
