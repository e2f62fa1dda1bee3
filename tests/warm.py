"""Processes of their own that start warm: torch and Lightning are imported once, and then only forked.

A command in a fresh interpreter spends most of its time on importing torch, Lightning and transformers. A
server (Python's own forkserver) imports these libraries once for each test process. Every command then runs
in a fork of it, with its own arguments, environment, folder, output and exit code. Nothing of `spg` is
imported beforehand.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "lightning.pytorch",
    "transformers",
    "hydra",
    "peft",
    "pandas",
    "matplotlib.pyplot",
    "datasets",
]


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm", *PRELOADED])
    return context


def _enter(line: list[str], folder: str, environment: dict[str, str], outputs: tuple[str, str]) -> None:
    """Become the command: its folder, environment, arguments and output; then run it as `python` would."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in zip((1, 2), outputs, strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False, errors="backslashreplace")
    sys.path[:] = [folder, *(place for place in sys.path if place not in ("", folder))]
    if "PYTHONPATH" in environment:
        sys.path[1:1] = environment["PYTHONPATH"].split(os.pathsep)
    flag, target, *arguments = line
    code: Any = 0
    try:
        sys.argv = [target, *arguments]
        if flag == "-m":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = "-c"
            exec(compile(target, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:  # noqa: BLE001  # as an interpreter does
        sys.excepthook(*sys.exc_info())
        code = 130 if isinstance(sys.exc_info()[1], KeyboardInterrupt) else 1
    finally:
        # in an interpreter's order: joblib ends its workers first, which the functions at exit wait for
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


class Popen:
    """A command that runs in a fork, with what of subprocess.Popen the tests use.

    line: [sys.executable, "-m", module, *arguments] or [sys.executable, "-c", code, *arguments].
    """

    def __init__(self, line: list[str], *, cwd: Path | str, env: dict[str, str] | None = None) -> None:
        self.args = line
        self.folder = tempfile.TemporaryDirectory()
        self.paths = (f"{self.folder.name}/out", f"{self.folder.name}/err")
        for path in self.paths:
            Path(path).touch()
        environment = dict(os.environ if env is None else env)
        self.process: ForkServerProcess = _context().Process(
            target=_enter, args=(line[1:], str(cwd), environment, self.paths)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, the negative number of the signal that ended it, None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def text(self) -> tuple[str, str]:
        """Return what it wrote so far to standard output and standard error."""
        out, err = (Path(path).read_text(encoding="utf-8") for path in self.paths)
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return what it wrote to standard output and standard error."""
        self.wait(timeout)
        return self.text()


def run(
    line: list[str], *, cwd: Path | str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a fork, as `subprocess.run(..., capture_output=True, text=True)` would."""
    process = Popen(line, cwd=cwd, env=env)
    try:
        code = process.wait()
    finally:
        process.kill()
    return subprocess.CompletedProcess(line, code, *process.text())
