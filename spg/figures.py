"""Figures from the files that a run leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from spg.loggers import read_metrics

# Okabe and Ito's palette, told apart by colour-blind readers
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def column(rows: Sequence[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Return (updates, values) of a column of metrics.csv, rows without a value left out."""
    kept = [row for row in rows if row.get(name)]
    return [int(row["update"]) for row in kept], [float(row[name]) for row in kept]


def curve(run: Path, title: str) -> Path:
    """Draw sampled reward and held-out accuracy over updates to `<run>/curve.png`."""
    rows = read_metrics(run / "metrics.csv")
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
    path = run / "curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
