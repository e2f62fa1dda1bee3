"""`spg <command> ...`: the commands of this project under one name, the same as `python -m spg.<command>`."""

from __future__ import annotations

import difflib
import importlib
import sys

from spg import __version__

# in the order in which they are used; each is the module spg.cli.<command>
COMMANDS = {
    "plan": "say what a run takes on named hardware: does it fit, how long, what to change",
    "train": "train a model by reinforcement learning, go on with a run, or run many in one command",
    "evaluate": "complete and score held-out examples with a model, a run, or from a file",
    "figures": "make tables and figures of a multirun",
    "export": "write the model of a run as a folder that other libraries load",
    "pretrain": "make supervised base weights for a small model",
    "pairs": "make preference pairs from a model's own completions",
    "reproduce": "compute again what stopped a run with a value that is not finite",
}


def usage() -> str:
    """Return what `spg --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: spg <command> [key=value ...]",
            "",
            *lines,
            "",
            "spg <command> --help lists what a command takes; spg --version prints the version.",
        ]
    )


def main() -> None:
    """Run the command that the first argument names; the process ends with 2 if there is no such command."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(f"{usage()}\n")
    elif name in ("-V", "--version"):
        sys.stdout.write(f"spg {__version__}\n")
    elif name in COMMANDS:
        sys.argv = [f"spg {name}", *arguments]
        importlib.import_module(f"spg.cli.{name}").main()
    else:
        sys.stderr.write(f"{_complaint(name)}\n" if name else f"{usage()}\n")
        sys.exit(2)


def _complaint(name: str) -> str:
    """Return a message for a name that is not a command."""
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    guess = f"; nearest: {close[0]}" if close else ""
    return f"spg {name}: there is no such command; allowed: {', '.join(COMMANDS)}{guess}"
