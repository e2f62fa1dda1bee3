"""Figures of what a sweep's runs do over updates: all settings in one panel, and one panel a setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from spg.core.files import read_csv
from spg.reports.axis import Axis
from spg.reports.plots import column, save, seeds_in_words
from spg.reports.tables import value_text
from spg.runs.multirun import Job, rows_of

LABELS = {"reward": "mean reward of a rollout", "grad_norm": "gradient norm before clipping"}
# markers on a line
MARKS = 6


@dataclass(frozen=True)
class Series:
    """What the finished runs of one setting logged in one column of metrics.csv.

    Attributes:
        setting: The swept keys without the seed, and their values.
        runs: (updates, values) of each seed.
    """

    setting: dict[str, Any]
    runs: list[tuple[list[int], list[float]]]


def read_series(jobs: Sequence[Job], swept: Sequence[str], name: str) -> list[Series]:
    """Return a series for each setting whose finished jobs have values in the column `name`."""
    keys = [key for key in swept if key != "seed"]
    groups: dict[tuple[Any, ...], list[tuple[list[int], list[float]]]] = {}
    for job, row in zip(jobs, rows_of(jobs, keys), strict=True):
        path = job.folder / "metrics.csv"
        if job.summary is not None and path.is_file():
            groups.setdefault(tuple(row[key] for key in keys), []).append(column(read_csv(path), name))
    return [
        Series(dict(zip(keys, setting, strict=True)), runs)
        for setting, runs in groups.items()
        if any(np.isfinite(values).any() for _, values in runs)
    ]


def rolling(
    updates: Sequence[int], values: Sequence[float], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the values in a window that ends at each update.

    Args:
        updates: Numbers of updates; they may repeat (several seeds) and have gaps (a reward comes once a
            rollout).
        values: Their values; those that are not finite are left out.
        window: Number of updates: a window at u holds the updates u - window + 1 to u.

    Returns:
        The updates that occur [n], means [n] and standard deviations [n].
    """
    at, y = np.asarray(updates, dtype=int), np.asarray(values, dtype=float)
    kept = np.isfinite(y)
    order = np.argsort(at[kept], kind="stable")
    at, y = at[kept][order], y[kept][order]
    ends = np.unique(at)
    first, last = np.searchsorted(at, ends - window, "right"), np.searchsorted(at, ends, "right")
    windows = [y[a:b] for a, b in zip(first, last, strict=True)]
    return ends, np.array([w.mean() for w in windows]), np.array([w.std() for w in windows])


def mean_over_seeds(
    runs: Sequence[tuple[Sequence[int], Sequence[float]]], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over seeds of the rolling mean, and its standard deviation over seeds.

    Args:
        runs: (updates, values) of each seed.
        window: Number of updates in the rolling mean.

    Returns:
        Updates [n], means [n] and standard deviations [n] (with n - 1; 0 if one seed has values). A seed
        keeps its latest rolling mean at updates for which it has no value itself.
    """
    rolled = [rolling(at, values, window)[:2] for at, values in runs if np.isfinite(values).any()]
    ends = np.unique(np.concatenate([at for at, _ in rolled]))
    means = np.full((len(rolled), len(ends)), np.nan)
    for row, (at, mean) in zip(means, rolled, strict=True):
        latest = np.searchsorted(at, ends, "right") - 1
        row[latest >= 0] = mean[latest[latest >= 0]]
    counts = (~np.isnan(means)).sum(0)
    average = np.nansum(means, 0) / counts
    squares = np.nansum((means - average) ** 2, 0)
    return ends, average, np.sqrt(squares / np.maximum(counts - 1, 1))


def plot_comparison(series: Sequence[Series], name: str, path: Path, column: str, window: int = 50) -> Path:
    """Draw a column of metrics.csv over updates, all methods in one panel with the legend beside it.

    Line and band are mean and standard deviation over seeds of the rolling mean. With a numeric key each
    category has a panel of its own, whose lines are shaded by that key.

    Args:
        series: The settings; at least one.
        name: Name of the sweep, for the title.
        path: The file to write.
        column: Name of the column.
        window: Number of updates in the rolling mean.

    Returns:
        The path.
    """
    axis = Axis([one.setting for one in series])
    panels: dict[Any, list[Series]] = {}
    for one in series:
        panels.setdefault(axis.category(one.setting) if axis.numeric else (), []).append(one)
    figure, grid = _grid(len(panels), beside=2.0)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(axis.ticks), 2)))
    handles: dict[str, Any] = {}
    ends, lows = [], []
    for axes, group in zip(grid.flat, panels.values(), strict=False):
        for i, one in enumerate(group):
            at, mean, sd = mean_over_seeds(one.runs, window)
            label, drawn = axis.label(one.setting), axis.line(one.setting)
            if axis.numeric:
                tick = one.setting[axis.numeric]
                label = f"{axis.numeric}={value_text(tick)}"
                drawn = {"color": shades[axis.ticks.index(tick)], "marker": None, "linestyle": "-"}
            # markers of neighbouring lines stand at different updates
            gap = max(1, len(at) // MARKS)
            start = i * gap // len(group)
            (line,) = axes.plot(at, mean, linewidth=1.6, markersize=6, markevery=(start, gap), **drawn)
            axes.fill_between(at, mean - sd, mean + sd, color=drawn["color"], alpha=0.12, linewidth=0)
            handles.setdefault(label, line)
            ends.append(at[-1])
            lows.append(mean.min())
        if len(panels) > 1:
            axes.set_title(axis.label(group[0].setting), fontsize=10)
    if len(handles) > 1:
        figure.legend(
            handles.values(), handles, frameon=False, fontsize=9, handlelength=4, loc="outside right upper"
        )
    counts = [len(one.runs) for one in series]
    band = "; band: standard deviation over seeds" if max(counts) > 1 else ""
    words = f"mean of the last {window} updates and of {seeds_in_words(counts)}{band}"
    return _finish(figure, grid, f"{name}\n{words}", path, column, max(ends), min(lows))


def plot_panels(series: Sequence[Series], name: str, path: Path, column: str, window: int = 50) -> Path:
    """Draw a column of metrics.csv over updates, one panel a setting.

    Line and band are mean and standard deviation of all values that the seeds of a setting have in the last
    `window` updates. Arguments and result are those of `plot_comparison`.
    """
    axis = Axis([one.setting for one in series])
    figure, grid = _grid(len(series))
    ends, lows = [], []
    for axes, one in zip(grid.flat, series, strict=False):
        updates, values = [u for at, _ in one.runs for u in at], [v for _, y in one.runs for v in y]
        at, mean, sd = rolling(updates, values, window)
        drawn = axis.line(one.setting)
        gap = max(1, len(at) // MARKS)
        axes.plot(at, mean, linewidth=1.6, markersize=5, markevery=(gap // 2, gap), **drawn)
        axes.fill_between(at, mean - sd, mean + sd, color=drawn["color"], alpha=0.12, linewidth=0)
        value = f"{axis.numeric}={value_text(one.setting[axis.numeric])}" if axis.numeric else ""
        axes.set_title("\n".join(filter(None, [axis.label(one.setting), value])), fontsize=10)
        ends.append(at[-1])
        lows.append(mean.min())
    counts = seeds_in_words([len(one.runs) for one in series])
    words = f"mean and standard deviation over the last {window} updates of {counts}"
    return _finish(figure, grid, f"{name}\n{words}", path, column, max(ends), min(lows))


def _finish(figure: Any, grid: Any, title: str, path: Path, column: str, end: int, low: float) -> Path:
    """Set limits, title and label, and write the figure."""
    grid[0, 0].set_xlim(0, end)
    if low >= 0:
        grid[0, 0].set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    figure.supylabel(LABELS.get(column, column), fontsize=10)
    return save(figure, path)


def _grid(n: int, beside: float = 0.4) -> tuple[Any, Any]:
    """Return a figure and its axes [rows, columns], n of them in use, with shared scales.

    Args:
        n: Number of panels.
        beside: Inches of the width for labels and a legend beside the panels.
    """
    columns = n if n < 4 else 2 if n == 4 else 4
    rows = -(-n // columns)
    width, height = (6.4, 4.4) if n == 1 else (4.4, 3.6) if columns < 4 else (3.0, 2.4)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(columns * width + beside, rows * height + 1),
        sharex=True,
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    for i, axes in enumerate(grid.flat):
        axes.grid(alpha=0.3)
        axes.set_visible(i < n)
        if n - columns <= i < n:  # nothing below
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("update")
    return figure, grid
