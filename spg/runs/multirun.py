"""Reading the directory of a multirun: its jobs, and a row for each.

A row is a mapping from columns to texts, numbers or None. Rows come from the files of the jobs or from a
committed runs.csv, and are the same from both, so that tables and figures need no directories of jobs.

Rows are plain mappings and not a data frame: a column such as `omega` holds 0, 0.25 and `auto`, and whole
numbers must stay whole in columns with empty cells. pandas would have to keep such columns as objects, and
importing it would take half a second at the start of every command.
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
from spg.runs.status import read_status

# when summary.json measures the test half: the base model, the best checkpoint, and the last weights
MOMENTS = ("before", "after", "last")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What a multirun's sweep.json says about it.

    Attributes:
        name: Name of the multirun.
        command: The command that started it.
        swept: The keys with several values, in order.
    """

    name: str
    command: str
    swept: list[str]

    @property
    def keys(self) -> list[str]:
        """The swept keys without the seed; their values make a setting."""
        return [key for key in self.swept if key != "seed"]


@dataclass(frozen=True)
class Job:
    """One run of a multirun.

    Attributes:
        name: Name of its directory.
        state: One of spg.runs.status.STATES.
        overrides: Its values of the swept keys.
        updates: How many updates it did, None if it has not finished.
        error: First line of the error that ended it, None if there was none.
        summary: Contents of its summary.json, None if it has not finished.
        folder: Its directory.
    """

    name: str
    state: str
    overrides: dict[str, Any]
    updates: int | None
    error: str | None
    summary: dict[str, Any] | None
    folder: Path


def read_sweep(folder: Path) -> Sweep:
    """Return what `<folder>/sweep.json` says.

    Raises:
        ConfigError: if there is no such file, or if it can't be read.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"sweep={folder} is not a directory; give the one that a multirun printed at its end"
        )
    if not (folder / "sweep.json").is_file():
        raise ConfigError(
            f"sweep={folder} is not the directory of a multirun: it has no sweep.json; give the one that "
            "a multirun printed at its end, or committed results with sweep.json and runs.csv"
        )
    record = _read_json(folder / "sweep.json")
    return Sweep(record["name"], record["command"], list(record["swept"]))


def read_jobs(folder: Path) -> list[Job]:
    """Return the jobs that have left a status.json, ordered by their values of the swept keys."""
    return sorted(map(_read_job, (path.parent for path in folder.glob("*/status.json"))), key=_order)


def rows_of(jobs: Sequence[Job], swept: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each job: its state, swept keys, the main figures of its summary, and its error."""
    columns = _columns(jobs, swept)
    rows = []
    for job in jobs:
        known = {"updates": job.updates} | (job.summary or {}) | job.overrides
        known |= {"job": job.name, "state": job.state, "error": job.error}
        rows.append({column: _parse(known.get(column)) for column in columns})
    return rows


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a multirun: from its jobs, or from runs.csv if only results were kept."""
    jobs = read_jobs(folder)
    if jobs or not (folder / "runs.csv").is_file():
        return rows_of(jobs, read_sweep(folder).swept)
    return read_runs_csv(folder / "runs.csv")


def read_runs_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a runs.csv, with numbers as numbers and empty cells as None."""
    return [{key: _parse(cell) for key, cell in row.items()} for row in read_csv(path)]


def write_runs(folder: Path, output: Path | None = None) -> Path:
    """Write the rows of a multirun to `runs.csv` in its directory, or in `output`, and return the path."""
    rows = read_rows(folder)
    columns = list(rows[0]) if rows else _columns([], read_sweep(folder).swept)
    return write_text((output or folder) / "runs.csv", csv_text(columns, rows))


def csv_text(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Return rows as CSV with these columns; None becomes an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _read_job(folder: Path) -> Job:
    status = read_status(folder)
    path = folder / "summary.json"
    # a status that can't be read is not one that is still to come
    otherwise = "of unknown state" if (folder / "status.json").is_file() else "running"
    return Job(
        name=folder.name,
        state=status.get("state", otherwise),
        overrides=status.get("overrides", {}),
        updates=status.get("updates"),
        error=status.get("error"),
        summary=_read_json(path) if status.get("state") == "finished" and path.is_file() else None,
        folder=folder,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} can't be read as JSON ({error}); run the multirun's command again"
        ) from error
    return record


def _order(job: Job) -> tuple[list[tuple[bool, float, str]], str]:
    """Return what jobs are sorted by: numbers before texts, and numbers by size."""
    values = map(_parse, job.overrides.values())
    return [(isinstance(v, str), 0 if isinstance(v, str) else v or 0, str(v)) for v in values], job.name


def _columns(jobs: Sequence[Job], swept: Sequence[str]) -> list[str]:
    names = [key for job in jobs for key in job.summary or {} if key.endswith(".after")]
    measured = [f"{key.removesuffix('after')}{moment}" for key in dict.fromkeys(names) for moment in MOMENTS]
    seed = [] if "seed" in swept else ["seed"]
    end = ["validation.best", "best.update", "updates", "seconds", "error"]
    return ["job", "state", *swept, *seed, *measured, *end]


def _parse(cell: Any) -> Any:
    """Return the number that a cell holds, None for an empty cell, else its text."""
    text = "" if cell is None else str(cell).lower() if isinstance(cell, bool) else str(cell)
    for kind in (int, float) if "_" not in text else ():  # Python would read the name 0_1 as the number 1
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
