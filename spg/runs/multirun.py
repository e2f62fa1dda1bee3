"""Reading a multirun's directory: its jobs, one row each, and points that average over seeds.

A row is a dict of text or numbers. Rows come from the jobs' own files or from a committed runs.csv
and are the same from both, so that what is made of them needs no job directories.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from spg.config import ConfigError
from spg.core import statistics
from spg.core.console import console
from spg.core.files import read_csv, write_text

MOMENTS = ("before", "after", "last")
RESAMPLES = 10_000

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What a multirun says of itself: name, command, and the keys that it swept, in order."""

    name: str
    command: str
    swept: list[str]

    @property
    def keys(self) -> list[str]:
        """The swept keys but the seed: what makes a setting."""
        return [key for key in self.swept if key != "seed"]


@dataclass(frozen=True)
class Job:
    """One run of a multirun; `summary` is None where it has none, `updates` how many it made."""

    name: str
    state: str
    overrides: dict[str, Any]
    updates: int | None
    error: str | None
    summary: dict[str, Any] | None
    folder: Path


@dataclass(frozen=True)
class Point:
    """One setting over its seeds: `values` [n] of a measure on the test half, and what sums them up.

    interval: 95% percentile bootstrap over seeds, sd: with n - 1; both None for one seed.
    validation: mean of the seeds' best values on the validation half, by which settings are chosen.
    """

    setting: dict[str, Any]
    seeds: list[Any]
    values: list[float]
    mean: float
    interval: tuple[float, float] | None
    sd: float | None
    validation: float | None


def read_sweep(folder: Path) -> Sweep:
    """Return what `<folder>/sweep.json` says; raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError(f"sweep={folder} is no directory; give the one that a multirun printed at its end")
    if not (folder / "sweep.json").is_file():
        raise ConfigError(
            f"sweep={folder} is no multirun's directory: it has no sweep.json; give the one that a multirun "
            "printed at its end, or committed results with sweep.json and runs.csv"
        )
    record = _json(folder / "sweep.json")
    return Sweep(record["name"], record["command"], list(record["swept"]))


def read_jobs(folder: Path) -> list[Job]:
    """Return the jobs that have left a status.json, ordered by their values of the swept keys."""
    return sorted(map(_job, (path.parent for path in folder.glob("*/status.json"))), key=_order)


def _order(job: Job) -> tuple[list[tuple[bool, float, str]], str]:
    values = map(_parsed, job.overrides.values())
    return [(isinstance(v, str), 0 if isinstance(v, str) else v or 0, str(v)) for v in values], job.name


def _job(folder: Path) -> Job:
    status = _json(folder / "status.json")
    path = folder / "summary.json"
    return Job(
        name=folder.name,
        state=status.get("state", "running"),
        overrides=status.get("overrides", {}),
        updates=status.get("updates"),
        error=status.get("error"),
        summary=_json(path) if status.get("state") == "finished" and path.is_file() else None,
        folder=folder,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} can't be read as JSON ({error}); run the multirun's command again"
        ) from error
    return record


def csv_text(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Return rows as CSV with these columns, None as an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _columns(jobs: Sequence[Job], swept: Sequence[str]) -> list[str]:
    names = [key for job in jobs for key in job.summary or {} if key.endswith(".after")]
    measured = [f"{key.removesuffix('after')}{moment}" for key in dict.fromkeys(names) for moment in MOMENTS]
    seed = [] if "seed" in swept else ["seed"]
    end = ["validation.best", "best.update", "updates", "seconds", "error"]
    return ["job", "state", *swept, *seed, *measured, *end]


def _parsed(cell: Any) -> Any:
    """Return the number that a cell holds, None for an empty one, else its text."""
    text = "" if cell is None else str(cell).lower() if isinstance(cell, bool) else str(cell)
    for kind in (int, float) if "_" not in text else ():  # 0_1 is a job's name and no number
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def rows_of(jobs: Sequence[Job], swept: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a job: job, state, swept keys, the main figures of its summary, error."""
    columns = _columns(jobs, swept)
    rows = []
    for job in jobs:
        known = {"updates": job.updates} | (job.summary or {}) | job.overrides
        known |= {"job": job.name, "state": job.state, "error": job.error}
        rows.append({column: _parsed(known.get(column)) for column in columns})
    return rows


def read_runs_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a runs.csv, numbers as numbers and empty cells as None."""
    return [{key: _parsed(cell) for key, cell in row.items()} for row in read_csv(path)]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a sweep's rows: from its jobs, or from runs.csv where only results were kept."""
    jobs = read_jobs(folder)
    if jobs or not (folder / "runs.csv").is_file():
        return rows_of(jobs, read_sweep(folder).swept)
    return read_runs_csv(folder / "runs.csv")


def write_runs(folder: Path, output: Path | None = None) -> Path:
    """Write a sweep's rows to `runs.csv` in its folder, or in `output`, and return the path."""
    rows = read_rows(folder)
    columns = list(rows[0]) if rows else _columns([], read_sweep(folder).swept)
    return write_text((output or folder) / "runs.csv", csv_text(columns, rows))


def table_of(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
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
    table = table_of(
        f"{sweep.name}: {ended} of {len(rows)} jobs finished",
        ["state", *sweep.swept],
        ["best\nvalidation", "accuracy,\ntest", "solved,\ntest", "\nseconds"],
    )
    for row in rows:
        words = [written(row.get(key)) for key in ("state", *sweep.swept)]
        values = [row.get(key) for key in ("validation.best", "accuracy.after", "solved.after")]
        numbers = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(*words, *numbers, "-" if row["seconds"] is None else f"{row['seconds']:.0f}")
    console.print(table)
    for row in rows:
        if row["error"] is not None:
            console.print(f"{row['job']} {row['state']}: {row['error']}", markup=False, soft_wrap=True)


def written(value: Any) -> str:
    """Return a swept value as one types it on a command line."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def measures(rows: Sequence[Row]) -> list[str]:
    """Return the names of what the finished jobs measured on the test half."""
    found = [
        key for row in rows for key, value in row.items() if key.endswith(".after") and value is not None
    ]
    return [key.removesuffix(".after") for key in dict.fromkeys(found)]


def _counts(row: Row, measure: str) -> bool:
    return row.get(f"{measure}.after") is not None  # only finished jobs have a summary


def left_out(rows: Sequence[Row], measure: str) -> str:
    """Return in one line which jobs are in no point and why; empty where all are."""
    out = [row for row in rows if not _counts(row, measure)]
    states = ["without result" if row["state"] == "finished" else row["state"] for row in out]
    reasons = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    names = ", ".join(str(row["job"]) for row in out)
    return f"Left out: {len(out)} of {len(rows)} jobs ({reasons}): {names}." if out else ""


def points(rows: Sequence[Row], swept: Sequence[str], measure: str) -> list[Point]:
    """Return a point a setting, from the finished jobs, in the order in which settings first appear.

    The measure is `<measure>.after`: the test half, at the checkpoint chosen on the validation half.
    The interval resamples the n seeds of a setting 10,000 times. With few seeds it is too narrow: it
    never leaves the range of their values, and three of them cover the mean far less than 95% of the time.
    """
    keys = [key for key in swept if key != "seed"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if _counts(row, measure):
            groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return [
        _point(dict(zip(keys, setting, strict=True)), group, measure) for setting, group in groups.items()
    ]


def _point(setting: dict[str, Any], rows: Sequence[Row], measure: str) -> Point:
    values = np.array([row[f"{measure}.after"] for row in rows], dtype=float)
    chosen_by = [row["validation.best"] for row in rows if row.get("validation.best") is not None]
    several = len(values) > 1
    return Point(
        setting=setting,
        seeds=[row.get("seed") for row in rows],
        values=values.tolist(),
        mean=float(values.mean()),
        interval=bootstrap(values) if several else None,
        sd=float(values.std(ddof=1)) if several else None,
        validation=sum(chosen_by) / len(chosen_by) if chosen_by else None,
    )


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean of `values` [n], always the same one."""
    return statistics.bootstrap(values, RESAMPLES)


def best(points: Sequence[Point]) -> Point | None:
    """Return the point with the highest mean on the validation half, the first of equals."""
    chosen = [point for point in points if point.validation is not None]
    return max(chosen, key=lambda point: point.validation or 0.0, default=None)
