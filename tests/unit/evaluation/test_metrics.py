"""Figures, their intervals and their table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spg.core.console import console
from spg.core.statistics import wilson
from spg.evaluation.evaluator import Evaluation
from spg.evaluation.metrics import summarize
from spg.evaluation.tables import show_results
from tests.unit.evaluation.helpers import (
    read,
)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_where_all_samples_are_alike_the_interval_has_a_width(right: float) -> None:
    made = {"tokens": None, "decoded": None, "steps": None, "near_ties": None}
    rows = [{"index": n // 4, "measures": {"accuracy": right}, **made} for n in range(40)]
    found = summarize(rows)
    assert found["interval_method"] == "wilson"
    assert found["interval"] == list(wilson(int(10 * right), 10))
    rows[0]["measures"] = {"accuracy": 1 - right}
    assert summarize(rows)["interval_method"] == "bootstrap over examples"


def test_the_table_says_what_two_scores_must_share(whole: Path) -> None:
    with console.capture() as printed:
        show_results(read(whole))
    text = printed.get()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("sudoku, split heldout", "parser exact", "shots 0", "24 tokens in 8 steps, blocks of 12"):
        assert words in text
    for words in ("temperature 0", "model LLaDA, weights base", "cpu, float32", "near", "a step"):
        assert words in text
    assert f"{100 * read(whole)['results']['base']['accuracy']:.2f}" in text


def test_training_and_evaluation_have_one_rule_for_intervals() -> None:
    """Wilson's if an item is right or wrong, and otherwise a bootstrap over items."""
    made = dict.fromkeys(("tokens", "decoded", "steps", "near_ties"))
    values = {"accuracy": [0.0, 0.25, 1.0, 0.5], "solved": [0.0, 0.0, 1.0, 0.0]}
    rows = [
        {"index": n, "measures": {name: column[n] for name, column in values.items()}, **made}
        for n in range(4)
    ]
    found = summarize(rows)["measures"]
    evaluation = Evaluation({name: np.array(column) for name, column in values.items()}, ("",) * 4, ())
    for name, method in (("accuracy", "bootstrap over examples"), ("solved", "wilson")):
        interval = evaluation.interval(name)
        assert (found[name]["mean"], found[name]["interval_method"]) == (evaluation.mean(name), method)
        assert found[name]["interval"] == [interval.low, interval.high]
        assert interval.method == method
    assert found["solved"]["interval"] == list(wilson(1, 4))
