"""Figures of results: a run's curve, and a sweep's measure over its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from spg.core.files import read_csv
from spg.reports.axis import Axis
from spg.reports.points import Point, best
from spg.reports.styles import BLACK, BLUE, GREY, KNOWN, ORANGE
from spg.reports.tables import value_text

# dots per inch of the files
DPI = 130


def column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Return (updates, values) of a column of metrics.csv, without the rows that have no value."""
    kept = [row for row in rows if row.get(name)]
    return [int(row["update"]) for row in kept], [float(row[name]) for row in kept]


def save(figure: Any, path: Path) -> Path:
    """Write a figure to a file, close it, and return the path."""
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def seeds_in_words(counts: Sequence[int]) -> str:
    """Return a number of seeds in words, as `3 seeds` or `2 to 3 seeds`."""
    low, high = min(counts), max(counts)
    return f"{low} to {high} seeds" if low < high else f"{low} seed{'s' * (low > 1)}"


def plot_run(run: Path, title: str) -> Path:
    """Draw sampled reward and validation accuracy over updates to `<run>/curve.png`; return the path."""
    rows = read_csv(run / "metrics.csv")
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    updates, rewards = column(rows, "reward")
    axes.plot(updates, rewards, color=GREY, linewidth=1, label="reward of rollouts (sampled)")
    updates, accuracy = column(rows, "val/accuracy")
    axes.plot(updates, accuracy, color=BLUE, marker="o", markersize=3, label="validation accuracy (greedy)")
    updates, solved = column(rows, "val/solved")
    if solved:
        axes.plot(updates, solved, color=ORANGE, marker="s", markersize=3, label="validation puzzles solved")
    axes.set(xlabel="update", ylabel="fraction", ylim=(0, 1), title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    return save(figure, run / "curve.png")


def plot_sweep(points: Sequence[Point], measure: str, name: str, path: Path) -> Path:
    """Draw a measure over the settings: lines over a numeric key, or bars if there is none.

    Args:
        points: The settings.
        measure: Name of the measure, a fraction.
        name: Name of the sweep, for the title.
        path: The file to write.

    Returns:
        The path.
    """
    axis = Axis([point.setting for point in points])
    wide = 9.0 if axis.numeric else max(6.5, 0.8 * len(points) + 1.5)
    figure, axes = plt.subplots(figsize=(wide, 4.8), constrained_layout=True)
    places, nudge = (_lines if axis.numeric else _bars)(axes, axis, points)
    for point, place in zip(points, places, strict=True):
        if len(point.values) == 1:
            continue
        at = [place + nudge] * len(point.values)  # beside the error bar
        colour = axis.line(point.setting)["color"]
        axes.scatter(at, point.values, s=14, color=colour, alpha=0.55, linewidth=0, zorder=3)
    marked = best(points)
    if marked is not None and len(points) > 1:
        star = {"s": 170, "marker": "*", "color": "#F0E442", "edgecolor": "black", "zorder": 5}
        label = "best mean on the\nvalidation half"
        axes.scatter(places[points.index(marked)], marked.mean, label=label, **star)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, frameon=False, fontsize=9, handlelength=4, loc="outside right upper")
    counts = [len(point.values) for point in points]
    bars = "; error bars: 95% bootstrap interval over seeds, dots: single seeds" if max(counts) > 1 else ""
    figure.suptitle(f"{name}\n{seeds_in_words(counts)} a setting{bars}", fontsize=10)
    axes.set_ylabel(f"{measure.replace('_', ' ')}, test half (fraction)")
    axes.grid(alpha=0.3, axis="both" if axis.numeric else "y")
    axes.set_axisbelow(True)
    return save(figure, path)


def _errors(points: Sequence[Point]) -> np.ndarray:
    """Return how far the intervals reach below and above the means [2, n]; 0 for one seed."""
    ends = [(p.mean, p.mean) if p.interval is None else p.interval for p in points]
    return np.array([(p.mean - low, high - p.mean) for p, (low, high) in zip(points, ends, strict=True)]).T


def _lines(axes: Any, axis: Axis, points: Sequence[Point]) -> tuple[list[float], float]:
    """Draw a line a category; return the place of each point and how far beside it seeds are drawn."""
    ticks = [axis.x({axis.numeric or "": tick}) for tick in axis.ticks]
    dodge = 0.014 * (ticks[-1] - ticks[0])  # or error bars of several lines hide each other
    middle = (len(axis.categories) - 1) / 2
    order = [axis.categories.index(axis.category(point.setting)) for point in points]
    places = [axis.x(p.setting) + dodge * (i - middle) for p, i in zip(points, order, strict=True)]
    for category in range(len(axis.categories)):
        own = sorted((i for i in range(len(points)) if order[i] == category), key=lambda i: places[i])
        line = [points[i] for i in own]
        at, means = [places[i] for i in own], [point.mean for point in line]
        drawn = {"label": axis.label(line[0].setting) or None} | axis.line(line[0].setting)
        axes.errorbar(at, means, _errors(line), capsize=3, linewidth=1.6, **drawn)
    axes.set_xticks(ticks, [value_text(tick) for tick in axis.ticks])
    axes.set_xlabel(f"{axis.numeric}{' (values evenly spaced)' if axis.even else ''}")
    return places, dodge / 2


def _bars(axes: Any, axis: Axis, points: Sequence[Point]) -> tuple[list[float], float]:
    """Draw a bar a setting; return the place of each and how far beside its middle seeds are drawn."""
    places, means = [float(i) for i in range(len(points))], [point.mean for point in points]
    looks = [axis.line(point.setting) for point in points]
    axes.bar(places, means, 0.62, color=[look["color"] for look in looks], alpha=0.5)
    axes.errorbar(places, means, _errors(points), fmt="none", ecolor=BLACK, capsize=4)
    for place, mean, look in zip(places, means, looks, strict=True):
        edge = {"markeredgecolor": BLACK, "markeredgewidth": 0.6}
        axes.plot(place, mean, color=look["color"], marker=look["marker"], markersize=8, zorder=4, **edge)
    labels = [
        ", ".join(KNOWN[name].label if name in KNOWN else name for name in axis.category(point.setting))
        for point in points
    ]
    crowded = max(map(len, labels)) * len(labels) > 60
    axes.set_xticks(places, labels, **({"rotation": 25, "ha": "right"} if crowded else {}))
    axes.set_xlabel(", ".join(axis.others))
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.8, len(points) - 0.2)
    return places, 0.14
