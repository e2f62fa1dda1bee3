"""Files of completions: our own, those of others, and broken ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spg.cli import evaluate
from spg.core.errors import InputError
from spg.evaluation.generations import read_generations
from spg.tasks.sudoku import Sudoku
from tests.helpers import ROOT
from tests.unit.evaluation.helpers import (
    ASKED,
    PUZZLE,
    SOLUTION,
    lines,
    read,
    saved,
    settings,
)


def test_saved_generations_are_scored_without_torch(tmp_path: Path) -> None:
    right, wrong = f"<answer>\n{SOLUTION}\n</answer>", f"<answer>\n{PUZZLE}\n</answer>"
    file = saved(tmp_path / "g.jsonl", {**ASKED, "generation": right}, {**ASKED, "generations": wrong})
    argv = ["evaluate", f"generations={file}", "parser=d1", f"hydra.run.dir={tmp_path / 'e'}"]
    code = (
        f"import sys, runpy\nsys.argv = {argv}\n"
        "try:\n    runpy.run_module('spg.evaluate', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50.00" in done.stdout
    record = read(tmp_path / "e")
    found = record["results"]["g.jsonl"]
    assert (found["accuracy"], found["interval_method"], found["n"]) == (0.5, "wilson", 2)
    assert (found["effective_length"], record["split"], record["parser"]) == (None, "as in the file", "d1")
    assert [line["correct"] for line in lines(tmp_path / "e")] == [True, False]


def test_a_list_of_generations_is_samples_and_lines_are_scored_per_model(tmp_path: Path) -> None:
    task = Sudoku(parser="d1")
    models = read_generations(saved(tmp_path / "g.jsonl", {**ASKED, "generations": ["a", "b"]}), task)
    (items,) = models.values()
    assert [(item.index, item.sample, completion.text) for item, completion in items] == [
        (0, 0, "a"),
        (0, 1, "b"),
    ]
    own = {"index": 0, "sample": 0, "completion": "c", "example": {"puzzle": PUZZLE, "solution": SOLUTION}}
    rows = [{**own, "model": model} for model in ("base", "checkpoints/best.ckpt")]
    assert list(read_generations(saved(tmp_path / "h.jsonl", *rows), task)) == [
        "base",
        "checkpoints/best.ckpt",
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ASKED, "line 2: no completion's text; expected it under one of completion, generation, generations"),
        ({**ASKED, "generation": 3}, "line 2: no completion's text"),
        ({"generation": "x", "ground_truth": SOLUTION}, "line 2: "),
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        *(
            ({**ASKED, "generation": "x", "example": wrong}, "line 2: `example` is .*; expected an object")
            for wrong in (None, 5, "x", [1])
        ),
        (
            {**ASKED, "completion": "x", "sample": 0},
            "line 2: the line has sample; then it needs index and model",
        ),
    ],
)
def test_lines_that_can_t_be_used_are_named(tmp_path: Path, row: Any, words: str) -> None:
    file = saved(tmp_path / "g.jsonl", {**ASKED, "generation": "x"}, row)
    with pytest.raises(InputError, match=words) as caught:
        read_generations(file, Sudoku(parser="d1"))
    assert str(file) in str(caught.value)


def test_files_that_can_t_be_used_are_named(tmp_path: Path) -> None:
    task = Sudoku(parser="d1")
    with pytest.raises(InputError, match="can't be read"):
        read_generations(tmp_path / "missing.jsonl", task)
    with pytest.raises(InputError, match="has no lines"):
        read_generations(saved(tmp_path / "empty.jsonl"), task)
    own = {"model": "base", "index": 0, "sample": 0, "completion": "c"}
    twice = {**own, "example": {"puzzle": PUZZLE, "solution": SOLUTION}}
    with pytest.raises(InputError, match="line 2: sample 0 of example 0 of base is there already"):
        read_generations(saved(tmp_path / "twice.jsonl", twice, twice), task)


def test_half_a_surrogate_pair_is_written_and_read_again(tmp_path: Path) -> None:
    file = saved(tmp_path / "g.jsonl", {**ASKED, "generation": "\ud800 é"}, {**ASKED, "generation": "x"})
    evaluate.start(settings("parser=d1", f"generations={file}"), tmp_path / "e")
    assert [line["completion"] for line in lines(tmp_path / "e")] == ["\ud800 é", "x"]
    assert read_generations(tmp_path / "e" / "generations.jsonl", Sudoku(parser="d1"))
    assert "é" in (tmp_path / "e" / "generations.jsonl").read_text()
