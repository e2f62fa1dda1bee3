"""The progress bar: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from spg.core import progress
from spg.core.progress import Progress


def terminal(is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_a_bar_with_figures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = terminal(True)
    with Progress("prompts", total=8, completed=2, transient=False, console=console) as bar:
        bar.update(5, "3 pairs")
    for words in ("prompts", "5/8", "3 pairs"):
        assert words in drawn(console)
    assert not caplog.records, "a terminal gets no lines"


@pytest.mark.parametrize("lines", [True, False])
def test_elsewhere_there_are_lines_if_asked_for(
    lines: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    console = terminal(False)
    with Progress("prompts", total=10, completed=2, lines=lines, console=console) as bar:
        now += 1
        bar.update(3, "0 pairs")  # too early for a line
        now += progress.LINE_SECONDS
        bar.update(4, "1 pair")
        now += progress.LINE_SECONDS + 1
        bar.update(10, "4 pairs")  # the end needs none
    assert not drawn(console)
    # two steps took 31 s and six are left
    assert caplog.messages == (["prompts: 4 of 10, 1 pair, 93 s left"] if lines else [])


def test_the_bar_stops_when_the_work_fails() -> None:
    console = terminal(True)
    with pytest.raises(ValueError, match="broken"), Progress("x", total=2, console=console):
        raise ValueError("broken")
    with Progress("y", total=2, console=console):  # rich allows one live display at a time
        pass
