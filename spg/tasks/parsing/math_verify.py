"""Equality of mathematical answers by the library math-verify, in a process of its own that can be killed.

SymPy may need any amount of time and memory for a text such as 10^{10^{10}}, and meanwhile holds the
interpreter. So a worker process compares one pair at a time. It starts with the first comparison, starts
again if one took too long or too much memory, and ends with this process. Run as a script, this file is
that worker, and imports nothing else of the package. The option -P keeps this folder off its path, so that
`math_verify` means the library there.
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
LONGEST = 1000  # characters of an answer that is compared; right answers have far fewer
MEMORY = 2 * 2**30  # bytes of address space for the worker
READY, RIGHT, WRONG = "ready", "right", "wrong"

# a word: more letters than a symbol has
WORDS = re.compile(r"[A-Za-z]{3}")


class Worker:
    """A process that compares answers, one comparison at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def verify(self, gold: str, answer: str, timeout: float = TIMEOUT) -> bool:
        """Return whether an answer equals the right one. The first call waits for the process to start.

        Args:
            gold: The right answer.
            answer: The answer to compare. More than LONGEST characters are wrong.
            timeout: Seconds after which the result is False.

        Raises:
            RunError: if the process cannot start.
        """
        if max(len(gold), len(answer)) > LONGEST:
            return False
        with self._lock:
            # a forked process has the worker of its parent in memory, but must not talk to it
            if self._process is None or self._owner != os.getpid():
                self._process, self._owner = _start_worker(), os.getpid()
            reply = None
            try:
                request = json.dumps({"gold": gold, "answer": answer, "timeout": timeout})
                reply = _exchange(self._process, request, timeout + 1)
            finally:
                # after an interruption too, since the late reply must not be taken for the next one
                if reply is None:
                    self._end()
            return reply == RIGHT

    def close(self) -> None:
        """End the process, if there is one; the next comparison starts another one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _start_worker() -> subprocess.Popen[bytes]:
    """Start a worker and wait until it is ready; raise RunError if it does not get ready."""
    process = subprocess.Popen(
        # -P keeps the folder of this file off the path of the worker
        [sys.executable, "-P", str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        # the order of terms in SymPy, and so its way to a result, depends on hashes
        env={**os.environ, "PYTHONHASHSEED": "0"},
        # out of reach of Ctrl-C, since a run stops only after the current update
        start_new_session=True,
    )
    reply = _exchange(process, "", PATIENCE)
    if reply != READY:
        from spg.core.errors import RunError  # not at the top: the worker imports nothing of the package

        process.kill()
        process.communicate()
        raise RunError(
            f"math-verify's process could not be started: {reply or 'it ended, or took too long'}; "
            "check that `python -c 'import math_verify'` works, or choose another task.parser and task.reward"
        )
    return process


def _exchange(process: subprocess.Popen[bytes], request: str, timeout: float) -> str | None:
    """Send a line and return the reply, or None if none comes in time."""
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
    """Return whether an answer equals the right one by math-verify; see `Worker.verify`."""
    return _worker.verify(gold, answer, timeout)


def _serve() -> None:
    """As the worker, answer requests from standard input until it ends."""
    # if a library prints, its text must not get into the replies
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # a comparison that takes too long ends the process, even if nobody is there to kill it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _are_equal("1", "1")
        status = READY
    except Exception as error:  # noqa: BLE001  # whatever it is, the other side tells the user
        status = " ".join(f"{type(error).__name__}: {error}".split())
    for line in sys.stdin:
        if line.strip():
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["timeout"])
            status = RIGHT if _are_equal(request["gold"], request["answer"]) else WRONG
            signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(f"{status}\n")
        replies.flush()


def _are_equal(gold: str, answer: str) -> bool:
    from math_verify import verify as same

    return same(_read(gold), _read(answer), timeout_seconds=None)


def _read(answer: str) -> list[object]:
    """Return what math-verify reads in an answer: as a text if it has words or dollars, else as LaTeX."""
    from math_verify import parse

    as_latex = f"${answer}$"
    in_words = "\\" not in answer and ("$" in answer or WORDS.search(answer))
    readings = (answer, as_latex) if in_words else (as_latex, answer)
    return parse(readings[0], parsing_timeout=None) or parse(readings[1], parsing_timeout=None)


if __name__ == "__main__":
    _serve()
