"""One terminal for log lines, the progress bar and tables, so that they do not overwrite each other."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from spg.core.files import DISK_FULL


class _LeavesOutLines(logging.Handler):
    """Leaves out lines that a full disk does not take; the run itself says that the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the library's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or error.errno not in DISK_FULL:
            super().handleError(record)


class LogFile(_LeavesOutLines, logging.FileHandler):
    """Appends log lines to a file."""

    def close(self) -> None:
        """Close the file, also if the disk does not take the last lines."""
        with suppress(OSError):
            super().close()


class _Lines(_LeavesOutLines, RichHandler):
    """Shows log lines as they are, without time, level, wrapping or highlighting."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(Text(self.format(record)), soft_wrap=True)
        except OSError:
            self.handleError(record)


console = Console(highlight=False)


def log_file(path: Path) -> LogFile:
    """Return a handler that appends bare log lines to the file `path`."""
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def take_over_logging() -> None:
    """Send log lines for standard output through the console, and silence Lightning's routine messages.

    Log files of Hydra's become ones that bear a full disk.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and getattr(handler, "stream", None) is sys.stdout:
            root.removeHandler(handler)
        elif type(handler) is logging.FileHandler:  # Hydra's
            root.removeHandler(handler)
            handler.close()
            own = log_file(Path(handler.baseFilename))
            own.setFormatter(handler.formatter)
            root.addHandler(own)
    if not any(isinstance(handler, _Lines) for handler in root.handlers):
        root.addHandler(_Lines(console=console))
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a run needs none
    # Lightning itself causes the first warning; prompts load so fast that they need no worker processes
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
