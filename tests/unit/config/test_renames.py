"""Paths of classes of version 0.5 are read as those of today, wherever they stand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spg import config
from spg.config import renames
from spg.runs.directory import read_config

# every `_target_` of conf/ in version 0.5, and what its code wrote by itself
TARGETS = """
spg.adapters.LoRA spg.adapters.SavedLoRA spg.advantages.GroupMean spg.advantages.LeaveOneOut
spg.advantages.Normalized spg.advantages.Raw spg.advantages.Shifted spg.decoding.Decoder spg.estimators.ELBO
spg.estimators.EUBO spg.estimators.Loose spg.estimators.Mixture spg.estimators.Sandwich spg.estimators.Zero
spg.masking.BlockAll spg.masking.BlockRandom spg.masking.Complementary spg.masking.Full spg.masking.Random
spg.masking.Spread spg.masking.Trajectory spg.models.llada.LLaDA spg.models.llada.LLaDAConfig
spg.models.qwen3.Qwen3Diffusion spg.models.qwen3.Qwen3DiffusionConfig spg.models.qwen3.a2d_tokenizer
spg.models.tokenizer.byte_tokenizer spg.models.tokenizer.pretrained spg.models.tokenizer.tiny_tokenizer
spg.objectives.dpo.DPO spg.objectives.espo.ESPO spg.objectives.grpo.GRPO spg.objectives.spg.SPG
spg.objectives.wd1.WD1 spg.preferences.Preferences spg.tasks.countdown.Countdown spg.tasks.gsm8k.GSM8K
spg.tasks.humaneval.HumanEval spg.tasks.math500.Math500 spg.tasks.mbpp.MBPP spg.tasks.sudoku.Sudoku
""".split()


@pytest.mark.parametrize("target", TARGETS)
def test_every_path_of_version_0_5_names_a_class_of_today(target: str) -> None:
    module, _, name = renames.current_path(target).rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert found.__name__ == target.rpartition(".")[2]


def old(text: str) -> str:
    """Write a configuration with the paths of 0.5."""
    for before, now in renames.RENAMED.items():
        text = text.replace(f"_target_: {now}\n", f"_target_: {before}\n")
    return text


@pytest.mark.parametrize("line", ["", "algorithm=espo", "algorithm=stepwise", "model.lora=paper"])
def test_a_run_s_configuration_with_old_paths_is_read_checked_and_built(line: str, tmp_path: Path) -> None:
    cfg = config.compose("config", line.split())
    text = OmegaConf.to_yaml(cfg, resolve=True)
    (tmp_path / "config.yaml").write_text(old(text))
    assert "spg.algorithms" not in old(text)
    assert "spg.rollout" not in old(text)
    assert OmegaConf.to_yaml(read_config(tmp_path)) == text
    unchanged = OmegaConf.load(tmp_path / "config.yaml")
    config.check(unchanged)
    objective = config.build(unchanged.algorithm.objective)
    assert type(objective).__module__.startswith("spg.algorithms")
    assert OmegaConf.to_yaml(unchanged) == old(text), "what is read is not changed itself"


def test_an_identity_and_a_record_are_updated_too() -> None:
    identity = {
        "masking._target_": "spg.masking.Full",
        "seed": "0",
        "task._target_": "spg.tasks.sudoku.Sudoku",
    }
    assert renames.update_paths(identity) == identity | {"masking._target_": "spg.algorithms.masking.Full"}
    record = {"algorithm": {"list": [{"_target_": "spg.estimators.ELBO"}, 3]}}
    assert renames.update_paths(record)["algorithm"]["list"][0] == {
        "_target_": "spg.algorithms.estimators.ELBO"
    }
