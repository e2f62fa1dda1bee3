"""Whole runs, small: what they leave, that they repeat, that they learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spg.core.files import read_csv
from spg.training.loggers import MetricsCSV
from tests.helpers import ROOT, comparable, run


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of eight updates."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    text = run("train", "experiment=quick", "seed=3", folder=folder)
    (folder / "printed.txt").write_text(text)
    return folder


def test_what_a_run_leaves(quick: Path) -> None:
    for name in ("config.yaml", "metrics.csv", "summary.json", "curve.png", "weights.safetensors"):
        assert (quick / name).stat().st_size > 0, name
    assert sorted(p.name for p in (quick / "checkpoints").iterdir()) == [
        "best.ckpt",
        "best.ckpt.sha256",
        "config.yaml",
        "last.ckpt",
        "last.ckpt.sha256",
    ]
    summary = json.loads((quick / "summary.json").read_text())
    for key in (
        "accuracy.before",
        "accuracy.after",
        "n",
        "seconds",
        "versions",
        "git_commit",
        "unused_knobs",
    ):
        assert key in summary
    low, high = summary["accuracy.after.interval"]
    assert low <= summary["accuracy.after"] <= high
    assert summary["updates"] == 8
    assert summary["n"] == 32


def test_what_a_run_prints(quick: Path) -> None:
    text = (quick / "printed.txt").read_text()
    for words in ("first rollout: reward", "validation: accuracy", "sample", "before", "Best checkpoint"):
        assert words in text
    assert f"Run directory: {quick}" in text
    assert "Traceback" not in text
    assert "warn" not in text.lower()


def test_metrics_have_the_names_of_the_field(quick: Path) -> None:
    rows = read_csv(quick / "metrics.csv")
    assert [row["update"] for row in rows] == [str(n) for n in range(9)]
    expected = {
        "reward",
        "reward_std",
        "rewards/cells/mean",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "bound/lower",
        "bound/upper",
        "bound/gap",
        "grad_norm",
        "lr",
        "time/rollout",
        "time/update",
        "throughput/tokens_per_s",
        "val/accuracy",
    }
    assert expected <= set(rows[0])
    assert all(row["loss"] and row["grad_norm"] for row in rows[1:])
    assert [bool(row["reward"]) for row in rows[1:]] == [True, False, False, False] * 2
    assert [row["update"] for row in rows if row["val/accuracy"]] == ["0", "4", "8"]
    assert float(rows[1]["lr"]) < float(rows[8]["lr"]), "warm-up"


@pytest.mark.long
def test_same_seed_same_run_and_another_seed_another(quick: Path, tmp_path: Path) -> None:
    run("train", "experiment=quick", "seed=3", folder=tmp_path / "same")
    run("train", "experiment=quick", "seed=4", folder=tmp_path / "other")
    weights = [load_file(f / "weights.safetensors") for f in (quick, tmp_path / "same", tmp_path / "other")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert comparable(quick) == comparable(tmp_path / "same")
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert comparable(quick) != comparable(tmp_path / "other")


def test_evaluation_of_a_run_and_of_the_base(quick: Path, tmp_path: Path) -> None:
    text = run("evaluate", f"run={quick}", folder=tmp_path / "e")
    assert "checkpoints/best.ckpt" in text
    record = json.loads((tmp_path / "e" / "results.json").read_text())
    summary = json.loads((quick / "summary.json").read_text())
    assert record["n"] == 32, "the run's own evaluation set"
    assert record["results"]["base"]["accuracy"] == summary["accuracy.before"]
    assert record["results"]["weights.safetensors"]["accuracy"] == summary["accuracy.last"]
    assert record["results"]["checkpoints/best.ckpt"]["accuracy"] == summary["accuracy.after"]
    assert list(record["results"]) == ["base", "checkpoints/best.ckpt", "weights.safetensors"]
    run("evaluate", "task.eval_size=16", "split=heldout", folder=tmp_path / "b")
    record = json.loads((tmp_path / "b" / "results.json").read_text())
    assert (record["n"], list(record["results"])) == (32, ["base"])


def test_evaluation_of_no_run_is_refused(tmp_path: Path) -> None:
    text = run("evaluate", f"run={tmp_path}", check=False)
    assert "is not the directory of a run" in text
    assert "Traceback" not in text


def test_mistakes_found_in_the_job_are_one_line(tmp_path: Path) -> None:
    text = run("train", "task.path=missing.csv", folder=tmp_path, check=False)
    assert "task.path=missing.csv: this file or folder does not exist" in text
    assert "Traceback" not in text
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    text = run("train", f"model.weights={tmp_path / 'w.safetensors'}", folder=tmp_path, check=False)
    assert "is not a safetensors file" in text
    assert "Traceback" not in text


@pytest.mark.long
def test_every_method_of_the_command_line_runs(tmp_path: Path) -> None:
    lines = ["estimator=eubo", "beta=1.0", "masking=random", "omega=0.25", "seed=3", "experiment=quick"]
    text = run("train", *lines, folder=tmp_path / "a")
    assert "omega=0.25 is read by no selected part" in text
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["unused_knobs"] == ["omega"]
    two = ["trainer.prompts_per_rollout=1", "group_size=2"]  # fewer sequences than samples are shown
    lines = ["estimator=zero", "advantage=normalized", "algorithm.objective.loss_norm=batch"]
    run("train", *lines, "trainer.micro_batch_size=40", "experiment=quick", *two, folder=tmp_path / "b")


@pytest.mark.long
def test_pretraining_where_no_weights_ship_is_said_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPG_CACHE", str(tmp_path / "cache"))
    lines = ["task.format=completion", "pretrain.steps=5", "experiment=quick"]
    text = run("train", *lines, folder=tmp_path / "a")
    assert "pretraining (5 steps)" in text
    (weights,) = (tmp_path / "cache").glob("*.safetensors")
    card = weights.with_suffix(".md").read_text()
    for words in ("Command: `python -m spg.", "Seed: 0", "Data: ", "accuracy: "):
        assert words in card
    assert "No base weights" not in run("train", *lines, folder=tmp_path / "b")


def test_pretraining_repeats_the_shipped_weights(tmp_path: Path) -> None:
    run("pretrain", f"output={tmp_path}", folder=tmp_path / "hydra")
    (made,) = tmp_path.glob("*.safetensors")
    made_tensors, shipped = load_file(made), load_file(ROOT / "spg" / "assets" / made.name)
    for name, tensor in shipped.items():
        assert torch.allclose(tensor, made_tensors[name], atol=1e-3), name


def test_metrics_file_grows_by_columns_and_merges_steps(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_metrics({"b": 2.0}, step=0)
    logger.log_metrics({"a": 3.0}, step=1)
    logger.log_metrics({"c": 4.0}, step=2)
    logger.finalize("success")
    assert read_csv(tmp_path / "metrics.csv") == [
        {"update": "0", "a": "1.0", "b": "2.0", "c": ""},
        {"update": "1", "a": "3.0", "b": "", "c": ""},
        {"update": "2", "a": "", "b": "", "c": "4.0"},
    ]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_the_default_run_learns(seed: int, tmp_path: Path) -> None:
    """The promise of the README: at least 25 points on the test half, with any seed."""
    run("train", "task=sudoku", "estimator=mixture", "beta=1.5", f"seed={seed}", folder=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy.after"] - summary["accuracy.before"] >= 0.25
    assert summary["clues_intact.after"] == 1.0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_countdown_learns(seed: int, tmp_path: Path) -> None:
    """The README's table: both halves rise by 6 points at least."""
    run("train", "task=countdown", "estimator=mixture", f"seed={seed}", folder=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation.best"] - summary["validation.before"] >= 0.06
    assert summary["accuracy.after"] - summary["accuracy.before"] >= 0.06
