"""Reading a multirun's directory: its jobs, one row each, and points that average over seeds.

A row is a dict of text or numbers. Rows come from the jobs' own files or from a committed runs.csv
and are the same from both, so that what is made of them needs no job directories.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spg.config import ConfigError
from spg.core.files import read_csv, write_text

MOMENTS = ("before", "after", "last")

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
