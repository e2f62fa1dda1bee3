"""The table that a training run shows at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from spg.core.console import console
from spg.runs.multirun import MOMENTS

log = logging.getLogger(__name__)


def show_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the measures of the test half before and after, the best checkpoint, and where the time went.

    Args:
        summary: Contents of the run's summary.json.
        folder: Directory of the run.
    """
    methods = sorted({value for key, value in summary.items() if key.endswith(".interval_method")})
    table = Table(title=f"Test half, greedy, n = {summary['n']} (95% interval: {', '.join(methods)})")
    table.add_column("measure")
    for heading in ("before", "after, best", "after, last"):
        table.add_column(heading, justify="right")
    for name in [key.removesuffix(".before.interval") for key in summary if key.endswith(".before.interval")]:
        row = [name.replace("_", " ")]
        for moment in MOMENTS:
            low, high = summary[f"{name}.{moment}.interval"]
            row.append(f"{summary[f'{name}.{moment}']:.3f}\n({low:.3f} to {high:.3f})")
        table.add_row(*row)
    console.print(table)
    best = f"update {summary['best.update']}, validation accuracy {summary['validation.best']:.3f}"
    log.info("Best checkpoint: %s (checkpoints/best.ckpt)", best)
    parts = ("rollout", "reward", "update", "evaluation")
    log.info(
        "Time: %.0f s; %s",
        summary["seconds"],
        ", ".join(f"{part} {summary[f'seconds.{part}']:.1f} s" for part in parts),
    )
    if summary["unused_knobs"]:
        log.info("Read by no selected part: %s", ", ".join(summary["unused_knobs"]))
    weights = next(name for name in ("weights.safetensors", "adapter") if (folder / name).exists())
    log.info("Run directory: %s (curve.png, metrics.csv, summary.json, %s)", folder, weights)
