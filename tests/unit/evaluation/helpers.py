"""What the tests of evaluation share: evaluating in this process, and reading what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spg import config
from spg.cli import evaluate
from spg.evaluation.settings import merge_settings

SMALL = ("task.eval_size=10", "threads=1", "eval_batch_size=8")
PUZZLE, SOLUTION = "4320004330100004", "4321124334122134"
ASKED = {"question": f"Solve the following Sudoku puzzle: {PUZZLE}\n", "ground_truth": SOLUTION}


def settings(*overrides: str) -> Any:
    return merge_settings(config.compose("evaluate", list(overrides)), list(overrides))


def evaluated(folder: Path, *overrides: str) -> dict[str, Any]:
    """Evaluate in this process and return what results.json holds."""
    evaluate.start(settings(*SMALL, *overrides), folder)
    return read(folder)


def read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return record


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def saved(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path
