"""The settings of an evaluation: those of a run, of older versions, contradictions."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from spg import config
from spg.config import ConfigError
from spg.evaluation import checkpoints
from spg.models import base_weights
from spg.runs import directory as runs
from tests.helpers import ROOT
from tests.unit.evaluation.helpers import (
    settings,
)


def test_a_run_s_settings_hold_unless_they_are_overridden(trained: Path, tmp_path: Path) -> None:
    given = f"run={trained}"
    cfg = settings(given)
    assert (cfg.task.eval_size, cfg.split, cfg.gen_length, cfg.decoding.steps) == (8, "test", 24, 8)
    cfg = settings(given, "gen_length=48")
    assert (cfg.decoding.gen_length, cfg.decoding.steps, cfg.decoding.block_size) == (48, 16, 12)
    cfg = settings(given, "gen_length=48", "decoding.steps=24", "block_size=6", "task.data_seed=3")
    assert (cfg.decoding.steps, cfg.decoding.block_size, cfg.task.data_seed) == (24, 6, 3)
    cfg = settings(given, "gen_length=36", "decoding=full_sequence", "split=validation")
    assert (cfg.decoding.steps, cfg.decoding.block_size, cfg.split) == (12, 36, "validation")
    cfg = settings(given, "task=sudoku", "task.format=completion", "parser=d1")
    assert (cfg.gen_length, cfg.block_size, cfg.decoding.gen_length) == (16, 8, 16), "the task's own"
    assert (cfg.task.eval_size, cfg.task.parser) == (256, "d1")
    full = tmp_path / "full"
    runs.write_config(config.compose("config", ["decoding=full_sequence"]), full.parent)
    cfg = settings(f"run={full.parent}", "gen_length=48")
    assert (cfg.decoding.block_size, cfg.decoding.steps) == (48, 16)


def test_a_model_is_asked_in_its_own_style(trained: Path, tmp_path: Path) -> None:
    given = ("model=llada_8b", f"model.path={tmp_path}")
    cfg = settings(*given)
    assert (cfg.task.prompt_style, cfg.task.format, cfg.task.shots) == ("instruct", "completion", 3)
    assert (cfg.gen_length, cfg.decoding.block_size, cfg.decoding.steps) == (256, 32, 128)
    cfg = settings(*given, "task=countdown", "task.operations=+")
    assert (cfg.task.prompt_style, cfg.task.operations, cfg.task.max_number) == ("instruct", "+", 100)
    cfg = settings(f"run={trained}")
    assert (cfg.task.prompt_style, cfg.gen_length) == ("bare", 24)

    # a run's settings hold, and with another task those that its model is asked that one with
    lines = [*given, "task.shots=1", "gen_length=128"]
    runs.write_config(config.compose("config", lines), tmp_path)
    cfg = settings(f"run={tmp_path}")
    assert (cfg.task.format, cfg.task.shots, cfg.gen_length, cfg.decoding.steps) == ("completion", 1, 128, 64)
    cfg = settings(f"run={tmp_path}", "gen_length=512")
    assert (cfg.task.shots, cfg.decoding.gen_length, cfg.decoding.steps) == (1, 512, 256)
    cfg = settings(f"run={tmp_path}", "task=countdown")
    assert (cfg.task.prompt_style, cfg.task.max_number) == ("instruct", 100)
    assert (cfg.gen_length, cfg.decoding.gen_length, cfg.decoding.steps) == (256, 256, 128)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["samples=4"], "give temperature=0.9, decoding.remasking=random, or samples=1"),
        (["decoding.temperature=0.5"], r"an evaluation has its own: temperature=0\.5"),
        (["generations=x.jsonl", "decoding=full_random"], "decoding=... can't be given with generations"),
        *(
            (["generations=x.jsonl", line], f"{line} can't be given with generations")
            for line in (
                "gen_length=8",
                "temperature=0.5",
                "decoding.steps=3",
                "model.weights=random",
                "block_size=4",
                "seed=3",
                "accelerator=cpu",
                "select=validation",
            )
        ),
        (["generations=x.jsonl", "run=y"], "run=y can't be given with generations"),
        (["generations=x.jsonl", "split=test"], "split=test can't be given with generations"),
        (["run=missing"], "run=missing is not the directory of a run"),
        (["select=best"], "allowed: one of: validation, test_average"),
        (["split=train"], "allowed: one of: auto, validation, test, heldout"),
        (["parser=nonsense"], "parser=nonsense"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(*overrides)


def test_samples_of_a_run_depend_on_its_own_decoding(tmp_path: Path) -> None:
    runs.write_config(config.compose("config", ["decoding.remasking=random"]), tmp_path)
    assert settings(f"run={tmp_path}", "samples=2").decoding.remasking == "random"
    with pytest.raises(ConfigError, match="2 times the same"):
        settings(f"run={tmp_path}", "samples=2", "decoding.remasking=margin")


def test_paths_in_the_configuration_do_not_depend_on_the_directory(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    assert settings("run=trained").run == str(trained)
    assert settings("generations=g.jsonl").generations == str(trained.parent / "g.jsonl")


def older(trained: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    cfg = runs.read_config(trained)
    change(cfg)
    folder.mkdir()
    runs.write_config(cfg, folder)
    return folder


def test_a_run_of_an_older_version_is_read_as_it_would_be_now(trained: Path, tmp_path: Path) -> None:
    def as_before(cfg: Any) -> None:
        cfg.task.reward = "cells"
        for key in ("lora", "prompt_style"):
            del cfg.model[key]
        for key in ("parser", "prompt_file", "prompt_style", "shots"):
            del cfg.task[key]

    cfg = settings(f"run={older(trained, tmp_path / 'old', as_before)}")
    assert (cfg.task.reward, cfg.task.parser, cfg.task.prompt_file) == ("released", "exact", None)
    assert (cfg.model.lora, cfg.task.eval_size) == (None, 8)
    assert (cfg.model.prompt_style, cfg.task.prompt_style, cfg.task.shots) == ("bare", "bare", 0)
    base = checkpoints._model_settings(cfg)
    assert base_weights.file_name(base) == base_weights.file_name(runs.read_config(trained))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("task.difficulty", 3, r"there is no setting task\.difficulty any more"),
        ("task.reward", "digits", r"task\.reward=digits: out of range"),
        ("pretrain", None, "its config.yaml has no pretrain"),
    ],
)
def test_a_run_that_this_version_can_t_read_is_said_to_be_another_s(
    trained: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    def change(cfg: Any) -> None:
        if value is None:
            del cfg[key]
        else:
            OmegaConf.update(cfg, key, value)

    with pytest.raises(ConfigError, match=f"is of another version of this project: {words}"):
        settings(f"run={older(trained, tmp_path / 'old', change)}")


def test_settings_of_a_run_s_task_can_be_given_without_choosing_it(tmp_path: Path) -> None:
    runs.write_config(config.compose("config", ["task=countdown", "task.eval_size=9"]), tmp_path)
    line = f"run={tmp_path}"
    assert config.task_of_run([line, "task.max_number=5"]) == "task=countdown"
    for chosen in ([line, "task=sudoku"], [], ["run=missing"], [f"{line},missing"]):
        assert config.task_of_run(chosen) is None
    code = (
        "from spg.cli import evaluate, launch\nimport sys\n"
        f"sys.argv = ['evaluate', '{line}', 'task.max_number=5', 'hydra.run.dir={tmp_path / 'e'}']\n"
        "evaluate.start = lambda cfg, folder: print(cfg.task.max_number, cfg.task.eval_size)\n"
        "launch.run('evaluate', evaluate.job)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "5 9\n", done.stderr


def test_a_run_that_knew_no_threshold_is_evaluated_with_one(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    text = file.read_text()
    for key in ("threshold", "factor"):
        assert f"  {key}: null\n" in text
        text = text.replace(f"  {key}: null\n", "")
    file.write_text(text)
    cfg = settings(f"run={tmp_path / 'run'}", "decoding.threshold=0.4")
    assert cfg.decoding.threshold == 0.4
    assert settings(f"run={tmp_path / 'run'}").decoding.get("threshold") is None


def test_steps_that_a_run_s_threshold_leaves_unread_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs.write_config(config.compose("config", ["decoding=threshold"]), tmp_path)
    with caplog.at_level(logging.WARNING):
        settings(f"run={tmp_path}", "decoding.steps=5")
    assert "decoding.steps=5 is not read: with decoding.threshold=0.9" in caplog.text
