"""Tables of a sweep: its jobs, and its settings over seeds, on the terminal, in Markdown and as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from spg.core.console import console
from spg.reports.points import Point, best
from spg.runs.multirun import Sweep, csv_text, read_rows, read_sweep


def value_text(value: Any) -> str:
    """Return a swept value as one types it on a command line."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def empty_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return an empty table, narrow enough for 80 characters, with columns of words and of numbers."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def show_jobs(folder: Path) -> None:
    """Print a table of a multirun's jobs, and under it the errors of those that failed."""
    sweep, rows = read_sweep(folder), read_rows(folder)
    ended = sum(row["state"] == "finished" for row in rows)
    table = empty_table(
        f"{sweep.name}: {ended} of {len(rows)} jobs finished",
        ["state", *sweep.swept],
        ["best\nvalidation", "accuracy,\ntest", "solved,\ntest", "\nseconds"],
    )
    for row in rows:
        words = [value_text(row.get(key)) for key in ("state", *sweep.swept)]
        values = [row.get(key) for key in ("validation.best", "accuracy.after", "solved.after")]
        numbers = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(*words, *numbers, "-" if row["seconds"] is None else f"{row['seconds']:.0f}")
    console.print(table)
    for row in rows:
        if row["error"] is not None:
            console.print(f"{row['job']} {row['state']}: {row['error']}", markup=False, soft_wrap=True)


def headings(sweep: Sweep, measure: str) -> list[str]:
    """Return the headings of the table of settings."""
    return [*sweep.keys, "seeds", f"{measure}, test", "95% interval", "sd", "validation"]


def cells(point: Point) -> list[str]:
    """Return a point as text, in the order of `headings`."""
    interval = "-" if point.interval is None else "{:.3f} to {:.3f}".format(*point.interval)
    setting = [value_text(value) for value in point.setting.values()]
    numbers = ["-" if x is None else f"{x:.3f}" for x in (point.sd, point.validation)]
    return [*setting, str(len(point.values)), f"{point.mean:.3f}", interval, *numbers]


def table_markdown(points: Sequence[Point], sweep: Sweep, measure: str, note: str) -> str:
    """Return the table of settings in Markdown, the best setting by validation in bold, and what it shows."""
    marked = best(points)
    lines = [headings(sweep, measure), ["---"] * len(headings(sweep, measure))]
    lines += [[f"**{cell}**" for cell in cells(p)] if p is marked else cells(p) for p in points]
    words = (
        f"`{sweep.command}`: mean over seeds on the test half, each at the checkpoint that is best on the "
        "validation half; bold: best mean on the validation half. The interval is a percentile bootstrap "
        f"over seeds, too narrow if there are few. {note}"
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{words.strip()}\n"


def table_csv(points: Sequence[Point], sweep: Sweep, measure: str) -> str:
    """Return the table of settings as CSV with all digits, an empty cell for what one seed can't say."""
    columns = [*sweep.keys, "n", "seeds", f"{measure}.mean", "low", "high", "sd", "validation.mean", "best"]
    marked, rows = best(points), []
    for point in points:
        low, high = point.interval or (None, None)
        seeds = " ".join(value_text(seed) for seed in point.seeds)
        values: list[Any] = [*point.setting.values(), len(point.values), seeds, point.mean, low, high]
        values += [point.sd, point.validation, int(point is marked)]
        rows.append(dict(zip(columns, values, strict=True)))
    return csv_text(columns, rows)


def show_points(points: Sequence[Point], sweep: Sweep, measure: str) -> None:
    """Print the table of settings, the best setting by validation in bold."""
    heads, n = [text.replace(", ", ",\n") for text in headings(sweep, measure)], len(sweep.keys)
    table = empty_table(f"{sweep.name}: mean over seeds; bold: best by validation", heads[:n], heads[n:])
    marked = best(points)
    for point in points:
        table.add_row(*cells(point), style="bold" if point is marked else None)
    console.print(table)
