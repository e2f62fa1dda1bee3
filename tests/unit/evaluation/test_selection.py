"""Which checkpoint of a run is chosen, and what is said about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spg.config import ConfigError
from spg.core.console import console
from spg.evaluation.selection import describe_selection, run_weights
from spg.evaluation.tables import show_results
from tests.unit.evaluation.helpers import (
    evaluated,
)


def test_the_checkpoint_that_validation_chose_is_marked(trained: Path, tmp_path: Path) -> None:
    record = evaluated(tmp_path / "e", f"run={trained}", "task.eval_size=8")
    assert list(record["results"]) == ["base", "checkpoints/best.ckpt", "weights.safetensors"]
    assert record["split"] == "test", "the half that chose no checkpoint"
    assert (record["selection"]["rule"], record["selection"]["chosen"]) == (
        "validation",
        "checkpoints/best.ckpt",
    )
    summary = json.loads((trained / "summary.json").read_text())
    for model, moment in zip(record["results"], ("before", "after", "last"), strict=True):
        assert record["results"][model]["accuracy"] == pytest.approx(summary[f"accuracy.{moment}"])
        for name, measure in record["results"][model]["measures"].items():
            key = f"{name}.{moment}.interval"
            assert measure["interval"] == pytest.approx(summary[key]), "one rule for both"
            assert measure["interval_method"] == summary[f"{key}_method"]


def test_by_test_average_every_checkpoint_is_scored_and_it_is_said(trained: Path, tmp_path: Path) -> None:
    record = evaluated(tmp_path / "e", f"run={trained}", "select=test_average")
    names = [f"checkpoints/{name}.ckpt" for name in ("best", "last", "update-000004", "update-000008")]
    assert list(record["results"]) == ["base", *names]
    accuracies = {name: record["results"][name]["accuracy"] for name in names}
    assert accuracies[record["selection"]["chosen"]] == max(accuracies.values())
    assert record["split"] == "heldout"
    with console.capture() as printed:
        show_results(record)
    words = "chosen on the scored items themselves, both halves, by the best average, as published"
    assert words in printed.get()
    assert f"{record['selection']['chosen']} *" in printed.get()


def test_a_run_without_final_weights_has_its_last_checkpoint(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").unlink()
    (tmp_path / "run" / "checkpoints" / "replaced-best.ckpt").touch()
    names = [name for name, _ in run_weights(tmp_path / "run", "validation")]
    assert names == ["checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    assert len(run_weights(tmp_path / "run", "test_average")) == 4
    with pytest.raises(ConfigError, match="holds neither checkpoints nor weights"):
        run_weights(tmp_path / "none", "validation")


@pytest.mark.parametrize(
    ("rule", "split", "scored_on", "among"),
    [
        ("validation", "test", "scored on the test half", False),
        ("validation", "heldout", "scored on both halves", True),
        ("validation", "validation", "scored on the validation half", True),
        ("test_average", "validation", "the scored items themselves, the validation half,", False),
        ("test_average", "test", "the scored items themselves, the test half,", False),
    ],
)
def test_the_words_of_a_selection_fit_the_split(rule: str, split: str, scored_on: str, among: bool) -> None:
    words = describe_selection(rule, split)
    assert scored_on in words
    assert ("the items it was chosen on are among those scored" in words) is among
