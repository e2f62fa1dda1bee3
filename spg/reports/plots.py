"""Figures: a run's curve, a sweep over its settings, the dynamics of a sweep's runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from spg.core.files import read_csv
from spg.runs.multirun import Job, Point, best, rows_of, written

# Okabe and Ito's palette, told apart by colour-blind readers
BLUE, ORANGE, GREY, GREEN, AMBER, BLACK = "#0072B2", "#D55E00", "#999999", "#009E73", "#E69F00", "#000000"
# label, colour and marker of a method, the same in every figure
METHODS = {
    "zero": ("w/o neg", GREY, "X"),
    "elbo": ("ELBO", AMBER, "s"),
    "eubo": ("EUBO", BLUE, "o"),
    "mixture": ("Mixture", ORANGE, "D"),
    "loose": ("loose", GREEN, "^"),
}
# for names that are no method: what is left of the palette, and three dark tones of Tol's
OTHERS = ("#56B4E9", "#CC79A7", BLACK, "#882255", "#999933", "#332288")
MARKERS = ("v", "P", "h", "<", ">", "d")
DASHES = ("-", "--", ":", "-.")
LABELS = {"reward": "mean reward of a rollout", "grad_norm": "gradient norm before clipping"}
TIGHT = 1 / 14  # of the axis: ticks nearer than that would overlap
CROWDED = 8  # lines in a panel


def column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Return (updates, values) of a column of metrics.csv, rows without a value left out."""
    kept = [row for row in rows if row.get(name)]
    return [int(row["update"]) for row in kept], [float(row[name]) for row in kept]


def curve(run: Path, title: str) -> Path:
    """Draw sampled reward and held-out accuracy over updates to `<run>/curve.png`."""
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
    return _save(figure, run / "curve.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Write a legend under the figure, as many columns as fit in its width."""
    if labels:
        columns = int(figure.get_figwidth() / (0.6 + 0.085 * max(map(len, labels))))
        place = {"loc": "outside lower center", "ncols": max(columns, 1)}
        figure.legend(handles, labels, frameon=False, fontsize=9, **place)


def style(name: str, among: Sequence[str]) -> tuple[str, str, str]:
    """Return (label, colour, marker) of a category; those of no method depend on the names `among`."""
    if name in METHODS:
        return METHODS[name]
    place = sorted(set(among) - set(METHODS)).index(name)
    return name, OTHERS[place % len(OTHERS)], MARKERS[place % len(MARKERS)]


class Axis:
    """How settings are laid out: `numeric` along x (or None), `category` a line, panel or bar each.

    The x axis is the swept key with the most values among those that hold numbers alone; all other
    keys together name the category, the estimator first, since it gives the colour.
    """

    def __init__(self, settings: Sequence[Mapping[str, Any]]) -> None:
        values = {key: list(dict.fromkeys(s[key] for s in settings)) for key in settings[0]}
        numbers = [k for k, v in values.items() if len(v) > 1 and all(isinstance(x, int | float) for x in v)]
        self.numeric = max(numbers, key=lambda key: len(values[key]), default=None)
        self.others = sorted((k for k in values if k != self.numeric), key=lambda k: k != "estimator")
        self.ticks = sorted(values[self.numeric]) if self.numeric else []
        self.categories = list(dict.fromkeys(self.category(setting) for setting in settings))
        spread = self.ticks[-1] - self.ticks[0] if self.ticks else 0
        self.even = any(b - a < TIGHT * spread for a, b in zip(self.ticks, self.ticks[1:], strict=False))

    def category(self, setting: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the values of all keys but the numeric one, as text."""
        return tuple(written(setting[key]) for key in self.others)

    def x(self, setting: Mapping[str, Any]) -> float:
        """Return the place of a setting on the x axis: its value, or its rank where ticks are even."""
        value = setting[self.numeric or ""]
        return self.ticks.index(value) if self.even else value

    def look(self, setting: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the label of a setting's category and how its line is drawn.

        The first of the category's names gives colour and marker, the others together the dashes.
        """
        category = self.category(setting)
        if not category:
            return "", {"color": "#444444", "marker": "o", "linestyle": "-"}
        _, colour, marker = style(category[0], [names[0] for names in self.categories])
        rests = list(dict.fromkeys(names[1:] for names in self.categories))
        dashes = DASHES[rests.index(category[1:]) % len(DASHES)]
        named = [
            METHODS[value][0] if key == "estimator" and value in METHODS else f"{key}={value}"
            for key, value in zip(self.others, category, strict=True)
        ]
        return ", ".join(named), {"color": colour, "marker": marker, "linestyle": dashes}


def seeds_of(counts: Sequence[int]) -> str:
    """Return a number of seeds in words, as 3 seeds or 2 to 3 seeds."""
    low, high = min(counts), max(counts)
    return f"{low} to {high} seeds" if low < high else f"{low} seed{'s' * (low > 1)}"


def sweep_figure(points: Sequence[Point], measure: str, name: str, path: Path) -> Path:
    """Draw a measure [0, 1] over the settings: lines over a numeric key, or bars where none is."""
    axis = Axis([point.setting for point in points])
    wide = 7.5 if axis.numeric else max(6.5, 0.8 * len(points) + 1.5)
    figure, axes = plt.subplots(figsize=(wide, 4.8), constrained_layout=True)
    places, nudge = (_lines if axis.numeric else _bars)(axes, axis, points)
    for point, place in zip(points, places, strict=True):
        if len(point.values) == 1:
            continue
        colour = axis.look(point.setting)[1]["color"]
        at = [place + nudge] * len(point.values)  # beside the error bar
        axes.scatter(at, point.values, s=14, color=colour, alpha=0.55, linewidth=0, zorder=3)
    chosen = best(points)
    if chosen is not None and len(points) > 1:
        star = {"s": 170, "marker": "*", "color": "#F0E442", "edgecolor": "black", "zorder": 5}
        label = "best mean on the validation half"
        axes.scatter(places[points.index(chosen)], chosen.mean, label=label, **star)
    _legend(figure, *axes.get_legend_handles_labels())
    counts = [len(point.values) for point in points]
    bars = "; error bars: 95% bootstrap interval over seeds, dots: single seeds" if max(counts) > 1 else ""
    figure.suptitle(f"{name}\n{seeds_of(counts)} a setting{bars}", fontsize=10)
    axes.set_ylabel(f"{measure.replace('_', ' ')}, test half (fraction)")
    axes.grid(alpha=0.3, axis="both" if axis.numeric else "y")
    axes.set_axisbelow(True)
    return _save(figure, path)


def _errors(points: Sequence[Point]) -> np.ndarray:
    """Return how far the intervals reach below and above the means [2, n]; nothing for one seed."""
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
        label, drawn = axis.look(line[0].setting)
        at, means = [places[i] for i in own], [point.mean for point in line]
        axes.errorbar(at, means, _errors(line), label=label or None, capsize=3, linewidth=1.6, **drawn)
    axes.set_xticks(ticks, [written(tick) for tick in axis.ticks])
    axes.set_xlabel(f"{axis.numeric}{' (values evenly spaced)' if axis.even else ''}")
    return places, dodge / 2


def _bars(axes: Any, axis: Axis, points: Sequence[Point]) -> tuple[list[float], float]:
    """Draw a bar a setting; return the place of each and how far beside its middle seeds are drawn."""
    places, means = [float(i) for i in range(len(points))], [point.mean for point in points]
    colours = [axis.look(point.setting)[1]["color"] for point in points]
    axes.bar(places, means, 0.62, color=colours, alpha=0.5)
    axes.errorbar(places, means, _errors(points), fmt="none", ecolor=BLACK, capsize=4)
    names = [[METHODS.get(name, (name,))[0] for name in axis.category(p.setting)] for p in points]
    labels = [", ".join(parts) for parts in names]
    crowded = max(map(len, labels)) * len(labels) > 60
    axes.set_xticks(places, labels, **({"rotation": 25, "ha": "right"} if crowded else {}))
    axes.set_xlabel(", ".join(axis.others))
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.8, len(points) - 0.2)
    return places, 0.14


def rolling(
    updates: Sequence[int], values: Sequence[float], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (updates [n], mean [n], sd [n]) of the values in the last `window` updates of each update.

    updates may repeat (several seeds) and have gaps (a reward comes once a rollout); values that are
    no finite numbers are left out. A window at u holds updates u - window + 1 to u.
    """
    at, y = np.asarray(updates, dtype=int), np.asarray(values, dtype=float)
    kept = np.isfinite(y)
    order = np.argsort(at[kept], kind="stable")
    at, y = at[kept][order], y[kept][order]
    ends = np.unique(at)
    first, last = np.searchsorted(at, ends - window, "right"), np.searchsorted(at, ends, "right")
    windows = [y[a:b] for a, b in zip(first, last, strict=True)]
    return ends, np.array([w.mean() for w in windows]), np.array([w.std() for w in windows])


def dynamics_figure(
    jobs: Sequence[Job], swept: Sequence[str], name: str, path: Path, column_name: str, window: int = 50
) -> Path | None:
    """Draw a column of metrics.csv over updates, a line a setting; None where no job has values.

    Line and band are mean and standard deviation of all values that the finished seeds of a setting
    have in the last `window` updates. With a numeric key each category has a panel of its own; where
    one would hold more than CROWDED lines, each setting has.
    """
    series = _series(jobs, [key for key in swept if key != "seed"], column_name, window)
    if not series:
        return None
    axis = Axis([setting for setting, _, _ in series])
    panels: dict[Any, list[Any]] = {}
    for entry in series:
        panels.setdefault(axis.category(entry[0]) if axis.numeric else (), []).append(entry)
    crowded = max(map(len, panels.values())) > CROWDED
    if crowded:
        panels = {i: [entry] for i, entry in enumerate(series)}
    figure, grid = _grid(len(panels))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(axis.ticks), 2)))
    handles: dict[str, Any] = {}
    for axes, entries in zip(grid.flat, panels.values(), strict=False):
        for setting, _, (at, mean, sd) in entries:
            label, drawn = axis.look(setting)
            value = f"{axis.numeric}={written(setting[axis.numeric])}" if axis.numeric else ""
            if value and not crowded:
                drawn |= {"color": shades[axis.ticks.index(setting[axis.numeric])], "linestyle": "-"}
            (line,) = axes.plot(at, mean, linewidth=1.6, **drawn | {"marker": None})
            axes.fill_between(at, mean - sd, mean + sd, color=drawn["color"], alpha=0.12, linewidth=0)
            handles.setdefault(value or label, line)
        if len(panels) > 1:  # the category is the same for all lines of a panel
            title = [*label.split(", "), *([value] if crowded and value else [])]
            axes.set_title("\n".join(filter(None, title)), fontsize=10)
    grid[0, 0].set_xlim(0, max(at[-1] for _, _, (at, _, _) in series))
    if min(mean.min() for _, _, (_, mean, _) in series) >= 0:
        grid[0, 0].set_ylim(bottom=0)
    if len(handles) > 1 and not crowded:
        _legend(figure, list(handles.values()), list(handles))
    words = (
        f"mean and standard deviation over the last {window} updates of {seeds_of([n for _, n, _ in series])}"
    )
    figure.suptitle(f"{name}\n{words}", fontsize=10)
    figure.supylabel(LABELS.get(column_name, column_name), fontsize=10)
    return _save(figure, path)


def _grid(n: int) -> tuple[Any, Any]:
    """Return a figure and its axes [rows, columns], n of them in use, with shared scales."""
    columns = n if n < 4 else 2 if n == 4 else 4
    rows = -(-n // columns)
    width, height = (6.4, 4.0) if n == 1 else (4.4, 3.6) if columns < 4 else (3.0, 2.4)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(columns * width + 0.4, rows * height + 1),
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


def _series(
    jobs: Sequence[Job], keys: Sequence[str], column_name: str, window: int
) -> list[tuple[dict[str, Any], int, Any]]:
    """Return (setting, seeds, rolling figures) of each setting whose finished jobs have values."""
    groups: dict[tuple[Any, ...], list[tuple[list[int], list[float]]]] = {}
    for job, row in zip(jobs, rows_of(jobs, keys), strict=True):
        path = job.folder / "metrics.csv"
        if job.summary is not None and path.is_file():
            found = column(read_csv(path), column_name)
            groups.setdefault(tuple(row[key] for key in keys), []).append(found)
    series = []
    for setting, runs in groups.items():
        updates, values = [u for at, _ in runs for u in at], [v for _, ys in runs for v in ys]
        if np.isfinite(values).any():
            figures = rolling(updates, values, window)
            series.append((dict(zip(keys, setting, strict=True)), len(runs), figures))
    return series
