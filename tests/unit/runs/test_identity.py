"""What makes two runs the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.config import renames
from spg.runs.identity import find_difference, identity


def test_a_setting_that_older_runs_lack_counts_only_if_it_is_not_their_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(renames.ADDED, "decoding.fresh", "None")
    older = OmegaConf.create({"decoding": {"steps": 4}})
    default = OmegaConf.create({"decoding": {"steps": 4, "fresh": None}})
    other = OmegaConf.create({"decoding": {"steps": 4, "fresh": 0.9}})
    assert identity(older) == identity(default) != identity(other)


def test_an_adapter_on_one_side_is_said_in_words() -> None:
    model = {"lora": {"_target_": "spg.models.lora.LoRA", "r": 16, "alpha": 32.0}}
    adapter, whole = (identity(OmegaConf.create({"model": m})) for m in (model, {"lora": None}))
    words = ("a LoRA adapter (r=16, alpha=32.0)", "all weights trained (model.lora=null)")
    assert find_difference(adapter, whole) == words
    assert find_difference(whole, adapter) == words[::-1]
    assert find_difference(whole, whole) is None
    other = identity(OmegaConf.create({"model": {"lora": {**model["lora"], "r": 8}}}))
    assert find_difference(adapter, other) == ("model.lora.r=16", "model.lora.r=8")
    assert find_difference({"a": "1"}, {"a": "1", "b.c": "2"}) == ("no b.c", "b.c=2")
    assert find_difference({"a": "None"}, {"a.c": "2", "a.d": "3"}) == ("a=null", "a={c: 2, d: 3}")


def spoil(key: str, to: str | None) -> DictConfig:
    """Return the default configuration with another name for a key, or without it."""
    cfg = OmegaConf.create(OmegaConf.to_container(config.compose("config", []), resolve=True))
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    value = node.pop(name)
    if to is not None:
        node[to] = value
    return cfg


@pytest.mark.parametrize(
    ("key", "to", "words"),
    [
        ("trainer.max_updates", "max_update", r"no trainer.max_updates \(nearest: trainer.max_update\)"),
        ("trainer.keep_every", "keep", r"unknown setting trainer.keep"),
        ("optimizer.betas", "beta", r"unknown setting optimizer.beta \(nearest: optimizer.betas\)"),
        ("mu", "nu", r"there is no mu;"),
        ("group_size", "groupsize", r"no group_size \(nearest: groupsize\)"),
        ("masking._target_", None, "there is no masking._target_;"),
        ("model.lora", None, "there is no model.lora;"),
    ],
)
def test_a_setting_with_another_name_in_a_run_s_file_is_named(key: str, to: str | None, words: str) -> None:
    with pytest.raises(config.ConfigError, match=rf"x/config\.yaml: .*{words}") as caught:
        config.check_complete(spoil(key, to), Path("x/config.yaml"))
    assert "Restore the file, or start a new run" in str(caught.value)


def test_whole_configurations_are_complete(tmp_path: Path) -> None:
    lines = ["model.lora=default", "logger=wandb", "algorithm=wd1", "task=countdown"]
    config.check_complete(config.compose("config", lines), tmp_path)
    old = OmegaConf.load(Path(__file__).parents[2] / "data" / "runs-0.5" / "run" / "config.yaml")
    assert isinstance(old, DictConfig)
    config.check_complete(old, tmp_path)
    with pytest.raises(config.ConfigError, match="decoding: missing a required argument: 'steps'"):
        config.build(spoil("decoding.steps", None).decoding)
