"""Multiruns of evaluations: one table, and what is left to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from spg.cli import evaluate
from spg.core.console import console
from spg.core.files import write_json
from spg.evaluation.comparison import report_multirun
from spg.runs.identity import OtherRunError
from spg.runs.status import write_status
from tests.helpers import run
from tests.unit.evaluation.helpers import (
    SMALL,
    read,
    settings,
)


@pytest.mark.long
def test_a_multirun_ends_with_one_table_and_does_only_what_is_left(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    words = [f"run={trained}", "--multirun", "gen_length=24,36", "threads=1", f"hydra.sweep.dir={folder}"]
    text = run("evaluate", *words)
    table = text[text.index("2 of 2 evaluations finished") :]
    assert all(word in table for word in ("24", "36", "average", "select=validation"))
    record = read(folder)
    assert [entry["model"] for entry in record["results"]] == [
        "base",
        "checkpoints/best.ckpt",
        "weights.safetensors",
    ]
    for entry in record["results"]:
        singles = [read(folder / f"gen_length-{n}")["results"][entry["model"]] for n in (24, 36)]
        assert [score["accuracy"] for score in entry["scores"].values()] == [s["accuracy"] for s in singles]
        assert entry["average"] == pytest.approx(sum(s["accuracy"] for s in singles) / 2)
        assert entry["chosen"] is (entry["model"] == "checkpoints/best.ckpt")
        assert f"{100 * entry['average']:.2f}" in table
    job = folder / "gen_length-36"
    kept = (job / "generations.jsonl").read_text().splitlines(keepends=True)
    (job / "generations.jsonl").write_text("".join(kept[:11]))
    write_status(job, state="interrupted")
    before = (folder / "gen_length-24" / "results.json").stat().st_mtime_ns
    again = run("evaluate", *words)
    assert f"Finished already: {folder / 'gen_length-24'}" in again
    assert (folder / "gen_length-24" / "results.json").stat().st_mtime_ns == before
    assert (job / "generations.jsonl").read_text() == "".join(kept)
    assert read(folder)["results"] == record["results"]


def test_a_finished_job_whose_run_went_on_is_left_alone(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    cfg = settings(*SMALL, f"run={tmp_path / 'run'}", "task.eval_size=4")
    job = tmp_path / "m" / "job"
    job.mkdir(parents=True)
    evaluate.sweep_job(cfg, job, {})
    before = read(job)
    evaluate.sweep_job(cfg, job, {})
    (tmp_path / "run" / "checkpoints" / "best.ckpt").touch()
    with pytest.raises(OtherRunError, match=r"figures of checkpoints/best\.ckpt as it was before"):
        evaluate.sweep_job(cfg, job, {})
    (tmp_path / "run" / "weights.safetensors").unlink()
    with pytest.raises(OtherRunError, match=r"checkpoints/last\.ckpt, weights\.safetensors"):
        evaluate.sweep_job(cfg, job, {})
    assert read(job) == before


def made_up(folder: Path, values: dict[str, Any], accuracies: dict[str, float], rule: str) -> None:
    """Leave a job's folder as an evaluation would; without accuracies, as one that failed."""
    job = folder / "_".join(f"{key}-{value}" for key, value in values.items())
    job.mkdir(parents=True)
    if not accuracies:
        write_status(job, state="failed", error="no memory", overrides=values)
        return
    write_status(job, state="finished", error=None, overrides=values)
    found = {model: {"accuracy": a, "interval": [0, 1], "n": 5} for model, a in accuracies.items()}
    write_json(
        job / "results.json",
        {"results": found, "selection": {"rule": rule}, "parser": "d1", "shots": 0, "split": "heldout"},
    )


def test_by_test_average_each_task_has_its_checkpoint(tmp_path: Path) -> None:
    """Chosen by the mean over the lengths, not by any one of them; where one is missing, none is."""
    scores = {
        ("gsm8k", 128): {"base": 0.9, "a.ckpt": 0.5, "b.ckpt": 0.1},
        ("gsm8k", 256): {"base": 0.9, "a.ckpt": 0.5, "b.ckpt": 0.8},
        ("math500", 128): {"base": 0.1, "a.ckpt": 0.2, "b.ckpt": 0.3},
        ("math500", 256): {},
    }
    for (task, length), accuracies in scores.items():
        made_up(tmp_path, {"task": task, "gen_length": length}, accuracies, "test_average")
    write_json(tmp_path / "sweep.json", {"name": "s", "command": "c", "swept": ["task", "gen_length"]})
    with console.capture() as printed:
        report_multirun(tmp_path)
    text = printed.get()
    entries = {(entry["task"], entry["model"]): entry for entry in read(tmp_path)["results"]}
    assert entries["gsm8k", "a.ckpt"]["chosen"]
    assert entries["gsm8k", "a.ckpt"]["average"] == pytest.approx(0.5)
    assert sum(entry["chosen"] for entry in entries.values()) == 1
    assert entries["math500", "b.ckpt"]["average"] is None
    assert "50.00*" in text
    assert "3 of 4 evaluations finished" in text
    assert "task-math500_gen_length-256 failed: no memory" in text
    assert "chosen on the scored items themselves, both halves" in text


def test_a_rule_marks_among_what_was_made_with_it(tmp_path: Path) -> None:
    best, last = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
    for rule in ("validation", "test_average"):
        made_up(tmp_path, {"select": rule}, {"base": 0.1, best: 0.2, last: 0.9}, rule)
    write_json(tmp_path / "sweep.json", {"name": "s", "command": "c", "swept": ["select"]})
    with console.capture() as printed:
        report_multirun(tmp_path)
    marked = [(e["select"], e["model"]) for e in read(tmp_path)["results"] if e["chosen"]]
    assert sorted(marked) == [("test_average", last), ("validation", best)]
    assert list(read(tmp_path)["selection"]) == ["test_average", "validation"]
    assert printed.get().count("select=") == 2
