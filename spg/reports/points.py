"""A sweep's rows averaged over seeds: one point for each setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spg.core.statistics import bootstrap
from spg.runs.multirun import Row

RESAMPLES = 10_000


@dataclass(frozen=True)
class Point:
    """One setting over its seeds.

    Attributes:
        setting: The swept keys without the seed, and their values.
        seeds: The n seeds.
        values: The measure on the test half [n].
        mean: Mean of the values.
        interval: 95% percentile bootstrap interval over seeds; None for one seed.
        sd: Standard deviation over seeds, with n - 1; None for one seed.
        validation: Mean of the seeds' best values on the validation half, by which settings are chosen.
    """

    setting: dict[str, Any]
    seeds: list[Any]
    values: list[float]
    mean: float
    interval: tuple[float, float] | None
    sd: float | None
    validation: float | None


def measures(rows: Sequence[Row]) -> list[str]:
    """Return the names of what the finished jobs measured on the test half."""
    found = [
        key for row in rows for key, value in row.items() if key.endswith(".after") and value is not None
    ]
    return [key.removesuffix(".after") for key in dict.fromkeys(found)]


def describe_missing(rows: Sequence[Row], measure: str) -> str:
    """Return in one line which jobs are in no point and why; an empty text if all are in one."""
    out = [row for row in rows if not _has(row, measure)]
    states = ["without result" if row["state"] == "finished" else row["state"] for row in out]
    reasons = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    names = ", ".join(str(row["job"]) for row in out)
    return f"Left out: {len(out)} of {len(rows)} jobs ({reasons}): {names}." if out else ""


def points(rows: Sequence[Row], swept: Sequence[str], measure: str) -> list[Point]:
    """Average the finished jobs of each setting over seeds.

    The measure is `<measure>.after`: the test half, at the checkpoint that was chosen on the validation half.
    The interval resamples the n seeds of a setting 10,000 times. With few seeds it is too narrow: it never
    leaves the range of their values, and three of them cover the mean far less than 95% of the time.

    Args:
        rows: One row for each job.
        swept: The swept keys; `seed` makes no setting of its own.
        measure: Name of the measure, without a moment.

    Returns:
        A point for each setting, in the order in which settings first appear.
    """
    keys = [key for key in swept if key != "seed"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if _has(row, measure):
            groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return [
        _point(dict(zip(keys, setting, strict=True)), group, measure) for setting, group in groups.items()
    ]


def best(points: Sequence[Point]) -> Point | None:
    """Return the point with the highest mean on the validation half, the first of equals."""
    candidates = [point for point in points if point.validation is not None]
    return max(candidates, key=lambda point: point.validation or 0.0, default=None)


def _has(row: Row, measure: str) -> bool:
    return row.get(f"{measure}.after") is not None  # only finished jobs have a summary


def _point(setting: dict[str, Any], rows: Sequence[Row], measure: str) -> Point:
    values = np.array([row[f"{measure}.after"] for row in rows], dtype=float)
    validations = [row["validation.best"] for row in rows if row.get("validation.best") is not None]
    several = len(values) > 1
    return Point(
        setting=setting,
        seeds=[row.get("seed") for row in rows],
        values=values.tolist(),
        mean=float(values.mean()),
        interval=bootstrap(values, RESAMPLES) if several else None,
        sd=float(values.std(ddof=1)) if several else None,
        validation=sum(validations) / len(validations) if validations else None,
    )
