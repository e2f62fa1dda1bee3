"""The way of the large models at the size of a toy: one command trains, goes on, exports, is evaluated."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from spg import config
from spg.cli import evaluate, export
from spg.cli.train import resume, start
from spg.core.errors import Interrupted
from spg.core.files import read_csv
from spg.evaluation.settings import merge_settings
from spg.runs import directory as runs
from spg.runs.status import read_status
from spg.tasks.question_answering import Questions
from tests import faults
from tests.helpers import real_data, run, same_run

SIZES = ("gen_length=12", "block_size=6", "decoding.steps=4", "task.eval_size=3")
SHORT = (
    "mu=2",
    "num_mc=1",
    "group_size=3",
    "optimizer.lr=3e-2",
    "trainer.max_updates=6",
    "trainer.prompts_per_rollout=2",
    "trainer.validate_every=2",
    "trainer.checkpoint_every=2",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
)
EVALUATION = ("eval_batch_size=4", "threads=1", "accelerator=cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of forty training rows, and no other."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    made = [{"question": f"What is {n} and {n}?", "answer": f"{n}+{n}\n#### {2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def trained(rows: Path, folder: Path) -> Path:
    """Train in this process, with the command's words and less of everything."""
    lines = ["model=llada_toy", "task=gsm8k", f"task.path={rows}", *SIZES, *SHORT]
    start(config.compose("config", lines), folder, [])
    return folder


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that nothing interrupted."""
    return trained(rows, tmp_path_factory.mktemp("runs") / "whole")


def completions(folder: Path, *overrides: str, model: int = -1) -> list[str]:
    """Evaluate in this process and return the texts of the model of that place in the results."""
    lines = [*EVALUATION, *overrides]
    evaluate.start(merge_settings(config.compose("evaluate", lines), lines), folder)
    record = json.loads((folder / "results.json").read_text())
    name = list(record["results"])[model]
    found = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [line["completion"] for line in found if line["model"] == name]


@pytest.fixture(scope="module")
def of_run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the run's best checkpoint writes for its test half."""
    return completions(tmp_path_factory.mktemp("of_run") / "e", f"run={whole}", model=1)


def test_an_adapter_is_trained_on_frozen_weights(whole: Path) -> None:
    cfg = runs.read_config(whole)
    assert cfg.model.lora.r == 16
    assert cfg.decoding.cache == "dual", "prompts are long in bytes"
    summary = json.loads((whole / "summary.json").read_text())
    assert 0 < summary["parameters.trained"] < 0.2 * summary["parameters"]
    assert [row["update"] for row in read_csv(whole / "metrics.csv") if row["loss"]] == list("123456")
    assert (summary["n"], read_status(whole)["state"]) == (3, "finished")


def test_interrupted_and_resumed_it_is_the_same_run(whole: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        faults.interrupted("3", patch.setattr)
        with pytest.raises(Interrupted):
            trained(rows, tmp_path / "run")
    assert read_status(tmp_path / "run")["state"] == "interrupted"
    resume(str(tmp_path / "run"), [])
    assert same_run(whole, tmp_path / "run")


def test_the_export_is_a_published_model_that_writes_the_same(
    whole: Path, rows: Path, of_run: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    export.job(config.compose("export", [f"run={whole}", "merge=true", f"output={folder}"]))
    lines = ["model=llada_8b", f"model.path={folder}", "model.dtype=float32", "model.precision=32-true"]
    lines += ["task=gsm8k", f"task.path={rows}", *SIZES, "split=test"]
    lines += [f"decoding.{key}={runs.read_config(whole).decoding[key]}" for key in ("cache", "remasking")]
    assert completions(tmp_path / "e", *lines) == of_run


def test_the_adapter_alone_writes_the_same(
    whole: Path, rows: Path, of_run: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    export.job(config.compose("export", [f"run={whole}", f"output={folder}"]))
    lines = ["model=llada_toy", "task=gsm8k", f"task.path={rows}", *SIZES, "split=test"]
    lines += [f"decoding.{key}={runs.read_config(whole).decoding[key]}" for key in ("cache", "remasking")]
    assert completions(tmp_path / "e", *lines, f"adapter={folder}") == of_run
    assert completions(tmp_path / "base", *lines) != of_run, "and the base model does not"


def test_no_row_is_both_trained_on_and_held_out(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def questions(*overrides: str) -> dict[str, list[Any]]:
        task: Questions = config.build(
            config.compose("config", ["model=llada_toy", "task=gsm8k", f"task.path={rows}", *overrides]).task
        )
        return {s: [e["question"] for e in task.examples(s)] for s in ("train", "validation", "test")}

    few = questions("task.eval_size=2")
    assert caplog.messages == [f"{rows}: the last 10 rows are held out, 30 trained on"]
    all_of_them = questions("task.eval_size=null")
    assert few["train"] == all_of_them["train"] == [f"What is {n} and {n}?" for n in range(30)]
    assert few["validation"] == all_of_them["validation"][:2]
    assert sorted(all_of_them["validation"] + all_of_them["test"]) == [
        f"What is {n} and {n}?" for n in range(30, 40)
    ]


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_the_command_learns(seed: int, tmp_path: Path) -> None:
    """A random model writes a tag now and then, is rewarded for it, and soon writes more of them."""
    data = real_data("gsm8k/train.jsonl")
    run("train", "model=llada_toy", "task=gsm8k", f"task.path={data}", f"seed={seed}", folder=tmp_path / "r")
    rewards = [float(row["reward"]) for row in read_csv(tmp_path / "r" / "metrics.csv") if row["reward"]]
    first, last = (sum(part) / len(part) for part in (rewards[:5], rewards[-10:]))
    assert first < 0.08
    assert last > 0.1
    assert last > 2 * first
