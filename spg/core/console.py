"""One terminal for log lines, the progress bar and tables, so that they do not overwrite each other."""

from __future__ import annotations

import logging
import sys
import warnings

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text


class _Lines(RichHandler):
    """Shows log lines as they are, without time, level, wrapping or highlighting."""

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(Text(self.format(record)), soft_wrap=True)


console = Console(highlight=False)


def take_over_logging() -> None:
    """Send log lines for standard output through the console, and silence Lightning's routine messages."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and getattr(handler, "stream", None) is sys.stdout:
            root.removeHandler(handler)
    if not any(isinstance(handler, _Lines) for handler in root.handlers):
        root.addHandler(_Lines(console=console))
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a run needs none
    # Lightning itself causes the first warning; prompts load so fast that they need no worker processes
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
