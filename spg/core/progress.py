"""One progress bar for everything that takes long: training, pretraining, evaluation, pairs."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from spg.core.console import console as shared_console

log = logging.getLogger(__name__)

# seconds between two log lines if there is no terminal for a bar
LINE_SECONDS = 30.0


class Progress:
    """Shows how far a piece of work is, its latest figures and the time left.

    On a terminal this is a bar. Elsewhere it is a log line every LINE_SECONDS seconds, if `lines` asks for
    them. Use it as a context manager, or call `start` and `stop`.

    Args:
        name: What is counted, such as `prompts` or a model's name.
        total: Number of steps of the whole work.
        completed: Number of steps that are done before the start.
        figures: What the bar shows before the first call of `update`.
        lines: Whether to log lines if standard output is not a terminal.
        transient: Whether the bar disappears when the work ends.
        console: Where to draw; the project's own console by default.
    """

    def __init__(
        self,
        name: str,
        total: int,
        completed: int = 0,
        figures: str = "first batch ...",
        lines: bool = True,
        transient: bool = True,
        console: Console = shared_console,
    ) -> None:
        self.name = name
        self.total = total
        self.completed = self._completed_before = completed
        self._started = self._last_line = time.monotonic()
        self._lines = lines and not console.is_terminal
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=completed, figures=figures)

    def start(self) -> None:
        """Show the bar and start the clock."""
        self._started = self._last_line = time.monotonic()
        self._bar.start()

    def stop(self) -> None:
        """Stop drawing the bar. A second call does nothing."""
        self._bar.stop()

    def update(self, completed: int, figures: str) -> None:
        """Show that `completed` steps are done in all, and the latest figures in words."""
        self.completed = completed
        self._bar.update(self._task, completed=completed, figures=figures)
        now = time.monotonic()
        if self._lines and now - self._last_line > LINE_SECONDS and completed < self.total:
            self._last_line = now
            done = max(1, completed - self._completed_before)
            seconds = (now - self._started) / done * (self.total - completed)
            log.info("%s: %d of %d, %s, %.0f s left", self.name, completed, self.total, figures, seconds)

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
