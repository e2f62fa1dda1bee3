"""Directories that version 0.5 left go on, are evaluated, exported and drawn (see tests/data/runs-0.5)."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.errors import RunError
from spg.core.files import read_csv
from spg.models.weights import read_checkpoint
from spg.runs.directory import read_config
from spg.runs.status import read_status
from tests.helpers import TIMES, run

LEFT = Path(__file__).parent.parent / "data" / "runs-0.5"
RUNS = ("run", "adapter", "sweep/algorithm-unigrpo")


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A copy of the directories."""
    return Path(shutil.copytree(LEFT, tmp_path / "left"))


def check_rows(found: Path, expected: Path) -> None:
    """Compare metrics but wall-clock times; other processors round differently."""
    ours, theirs = read_csv(found), read_csv(expected)
    assert [row["update"] for row in ours] == [row["update"] for row in theirs]
    for own, other in zip(ours, theirs, strict=True):
        names = [name for name in other if not name.startswith(TIMES)]
        assert [name for name in own if not name.startswith(TIMES)] == names
        for name in names:
            assert bool(own[name]) == bool(other[name]), name
            if other[name]:
                expected_value = pytest.approx(float(other[name]), rel=1e-5, abs=1e-9)
                assert float(own[name]) == expected_value, (own["update"], name)


@pytest.mark.parametrize(("name", "updates"), [(RUNS[0], 8), (RUNS[1], 8), (RUNS[2], 6)])
def test_a_run_goes_on_as_version_0_5_would_have(left: Path, name: str, updates: int) -> None:
    """Weights, optimizer, adaptive omega, old policy and validation history all come from the checkpoint."""
    folder = left / name
    resume(str(folder), [f"trainer.max_updates={updates}"])
    check_rows(folder / "metrics.csv", LEFT / "longer" / f"{folder.name}-{updates}.csv")
    assert read_status(folder)["state"] == "finished"
    text = (folder / "config.yaml").read_text()
    for gone in ("spg.masking.", "spg.estimators.", "spg.objectives.", "spg.advantages.", "spg.decoding."):
        assert gone not in text, "the configuration that is written names classes as they are now"
    resume(str(folder), [f"trainer.max_updates={updates + 2}"])


def test_a_run_goes_on_from_a_named_checkpoint_with_what_may_change(left: Path) -> None:
    folder = left / "run"
    lines = ["trainer.max_updates=6", "trainer.checkpoint_every=2", "trainer.micro_batch_size=5"]
    resume(str(folder / "checkpoints" / "best.ckpt"), lines)
    cfg = read_config(folder)
    assert (cfg.trainer.max_updates, cfg.trainer.checkpoint_every) == (6, 2)
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["spg"]["updates"] == 6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["beta=2"], r"beta=2: a run goes on with its own settings \(beta=1\.5"),
        (["trainer.max_update=9"], r"nearest: trainer\.max_updates"),
        ([], r"is finished; train on with a higher trainer\.max_updates than 4"),
    ],
)
def test_what_may_not_change_is_refused(left: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resume(str(left / "run"), overrides)


def test_an_edited_part_does_not_pass_for_a_renamed_one(left: Path) -> None:
    path = left / "run" / "config.yaml"
    path.write_text(path.read_text().replace("spg.advantages.GroupMean", "spg.advantages.LeaveOneOut"))
    with pytest.raises(RunError, match=r"belongs to a run with advantage\._target_=\S*GroupMean"):
        resume(str(left / "run"), ["trainer.max_updates=8"])


def test_the_same_multirun_finds_its_jobs_finished(left: Path) -> None:
    folder = left / "sweep"
    before = {path: path.read_bytes() for path in folder.glob("algorithm-*/*") if path.is_file()}
    record = json.loads((folder / "sweep.json").read_text())
    arguments = shlex.split(record["command"].replace("hydra.sweep.dir=sweep", f"hydra.sweep.dir={folder}"))
    text = run("train", *arguments[3:])
    for name in ("algorithm-unigrpo", "algorithm-espo"):
        assert f"Finished already: {folder / name}" in text
    assert (folder / "runs.csv").read_bytes() == (LEFT / "sweep" / "runs.csv").read_bytes()
    assert {path: path.read_bytes() for path in before} == before


def test_another_multirun_does_not_take_its_jobs(left: Path) -> None:
    folder = left / "sweep"
    command = json.loads((folder / "sweep.json").read_text())["command"]
    arguments = [line for line in shlex.split(command)[3:] if not line.startswith("hydra.sweep.dir")]
    text = run("train", *arguments, "mu=2", f"hydra.sweep.dir={folder}", check=False)
    assert f"{folder / 'algorithm-espo'} holds a run with mu=4, not 2" in text
    assert "2 of the multirun's jobs were left alone" in text


def test_a_multirun_makes_its_tables(left: Path, tmp_path: Path) -> None:
    text = run("figures", f"sweep={left / 'sweep'}", f"output={tmp_path / 'figures'}")
    assert "unigrpo" in text
    assert (tmp_path / "figures" / "runs.csv").read_bytes() == (LEFT / "sweep" / "runs.csv").read_bytes()
    (espo, _) = read_csv(LEFT / "sweep" / "runs.csv")
    table = read_csv(tmp_path / "figures" / "table.csv")
    assert float(table[0]["accuracy.mean"]) == float(espo["accuracy.after"])
    # committed results hold no jobs
    for name in ("algorithm-unigrpo", "algorithm-espo"):
        shutil.rmtree(left / "sweep" / name)
    run("figures", f"sweep={left / 'sweep'}", f"output={tmp_path / 'again'}")
    assert (tmp_path / "again" / "table.csv").read_bytes() == (tmp_path / "figures/table.csv").read_bytes()


def results(folder: Path) -> dict[str, Any]:
    """Return what an evaluation measured, by the model."""
    record: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return record["results"]


def test_a_run_is_evaluated_with_its_own_settings(left: Path, tmp_path: Path) -> None:
    run("evaluate", f"run={left / 'run'}", "split=test", "threads=1", folder=tmp_path / "evaluation")
    ours, theirs = results(tmp_path / "evaluation"), results(LEFT / "evaluation")
    assert ours.keys() == theirs.keys()
    for name, found in theirs.items():
        # a few decisions are so close that other processors may decide them differently
        assert ours[name]["accuracy"] == pytest.approx(found["accuracy"], abs=0.01)
        assert ours[name]["n"] == found["n"]


def test_saved_completions_are_scored_again(left: Path, tmp_path: Path) -> None:
    file = left / "evaluation" / "generations.jsonl"
    run("evaluate", "task=sudoku", f"generations={file}", folder=tmp_path / "scored")
    ours, theirs = results(tmp_path / "scored"), results(LEFT / "evaluation")
    assert {name: found["measures"] for name, found in ours.items()} == {
        name: found["measures"] for name, found in theirs.items()
    }


def test_a_finished_evaluation_is_not_done_again(left: Path) -> None:
    text = run("evaluate", f"resume={left / 'evaluation'}", check=False)
    assert "this evaluation is finished" in text


def test_a_run_is_exported(left: Path, tmp_path: Path) -> None:
    run("export", f"run={left / 'run'}", f"output={tmp_path / 'export'}")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    saved = read_checkpoint(left / "run" / "checkpoints" / "best.ckpt")["state_dict"]
    assert weights.keys() == {name.removeprefix("policy.network.") for name in saved}
    assert all(torch.equal(weights[name], saved[f"policy.network.{name}"]) for name in weights)
    run("export", f"run={left / 'adapter'}", "merge=false", f"output={tmp_path / 'adapter'}")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == load_file(LEFT / "adapter" / "adapter" / "adapter_model.safetensors").keys()
