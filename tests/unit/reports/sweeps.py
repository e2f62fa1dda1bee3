"""Sweeps by hand: directories of jobs with made-up results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

COMMAND = "python -m spg.train -cd sweeps -cn beta"
# (estimator, beta): test accuracy and validation accuracy of seeds 0, 1, 2
RESULTS = {
    ("eubo", 0.5): ([0.50, 0.60, 0.40], [0.5, 0.5, 0.5]),
    ("eubo", 2.0): ([0.90, 0.80, 0.85], [0.60, 0.60, 0.60]),  # best on the test half
    ("mixture", 0.5): ([0.70, 0.71, 0.72], [0.8, 0.9, 0.7]),  # best on the validation half
    ("mixture", 2.0): ([0.30, 0.30, 0.30], [0.30, 0.40, 0.50]),
}


def make_sweep(folder: Path, swept: list[str], name: str = "beta") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"name": name, "command": COMMAND, "swept": swept}
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def make_job(
    sweep: Path, name: str, overrides: dict[str, Any], state: str = "finished", **summary: Any
) -> Path:
    """Make a job's directory: two updates a rollout, reward 0.1 per rollout and seed-dependent norms."""
    folder = sweep / name
    folder.mkdir()
    error = "NonFinite: the loss is nan; lower optimizer.lr" if state == "failed" else None
    status = {"state": state, "overrides": overrides, "updates": 8, "error": error}
    (folder / "status.json").write_text(json.dumps(status))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["update", "val/accuracy", "reward", "grad_norm"])
        writer.writeheader()
        writer.writerow({"update": 0, "val/accuracy": 0.3})
        for update in range(1, 9):
            reward = {"reward": 0.1 * update} if update % 2 else {}
            writer.writerow({"update": update, "grad_norm": 1 + overrides.get("seed", 0), **reward})
    if state == "finished":
        (folder / "summary.json").write_text(
            json.dumps({"updates": 8, "seconds": 12.5, "best.update": 4} | summary)
        )
    return folder
