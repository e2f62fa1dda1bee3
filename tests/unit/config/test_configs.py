"""Every configuration composes, is checked, and builds; mistakes are answered before torch is imported."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from spg import config
from spg.config import composition
from spg.core.errors import InputError
from spg.models import base_weights
from tests.helpers import ROOT

OPTIONS = {
    group: sorted(p.stem for p in (config.CONF_DIR / group).glob("*.yaml")) for group in config.groups()
}
EVERY = [f"{group}={option}" for group, options in OPTIONS.items() for option in options]
EVERY += [f"estimator@positive={option}" for option in OPTIONS["estimator"]]


@pytest.mark.parametrize("override", EVERY)
def test_every_option_composes_and_builds(override: str) -> None:
    task = [f"task={override.rpartition('_')[2]}"] if override.startswith("tuned/task=") else []
    pairs = ["group_size=2", f"preferences.path={__file__}"] if override == "preferences=pairs" else []
    cfg = config.compose("plan" if override.startswith("hardware=") else "config", [override, *task, *pairs])
    for node in (cfg.task, cfg.masking, cfg.advantage, cfg.decoding, cfg.algorithm.objective):
        assert config.build(node) is not None
    with torch.device("meta"):
        network = config.build(cfg.model.network, seed=None)
    assert network.config.d_model == cfg.model.network.config.get("d_model", network.config.d_model)
    if cfg.model.path is None:  # else it has to be fetched
        assert len(config.build(cfg.model.tokenizer)) == cfg.model.network.config.vocab_size


@pytest.mark.parametrize("primary", ["evaluate", "pretrain", "pairs"])
def test_other_entry_points_compose(primary: str) -> None:
    cfg = config.compose(primary, [])
    assert config.build(cfg.task).name == "sudoku"
    assert config.build(cfg.decoding, temperature=0.0).gen_length == 24


@pytest.mark.long
def test_pairs_of_methods_build() -> None:
    for estimator, masking in itertools.product(OPTIONS["estimator"], OPTIONS["masking"][:2]):
        advantage = OPTIONS["advantage"][len(estimator) % 4]
        lines = [f"estimator={estimator}", f"masking={masking}", f"advantage={advantage}"]
        cfg = config.compose("config", lines)
        config.build(cfg.algorithm.objective)


def test_symbols_reach_the_constructors() -> None:
    lines = ["beta=1.7", "omega=0.3", "block_size=5", "num_mc=3", "estimator@positive=eubo", "gen_length=30"]
    cfg = config.compose("config", lines)
    objective = config.build(cfg.algorithm.objective)
    assert objective.sandwich.negative.omega == 0.3
    assert objective.sandwich.negative.upper.beta == objective.sandwich.positive.beta == 1.7
    masking, decoder = config.build(cfg.masking), config.build(cfg.decoding)
    assert (masking.block_size, masking.num_mc, decoder.block_size, decoder.gen_length) == (5, 3, 5, 30)
    cfg = config.compose("config", ["decoding.block_size=4", "decoding.steps=9"])
    assert config.build(cfg.decoding).block_size == 4
    assert config.build(cfg.masking).block_size == 12
    assert config.compose("config", ["decoding=full_sequence"]).decoding.block_size == 24


def test_every_number_and_choice_has_a_rule() -> None:
    """A number without a rule would be checked nowhere."""
    free = {"weights", "project", "entity", "path", "output", "run", "wandb", "experiment", "resume"}
    free |= {"sweep", "measure", "page", "name", "file", "lora", "generations", "prompt_file", "train_path"}
    free |= {"adapter", "checkpoint", "revision", "mask_token", "eos_token", "pad_token"}
    given = {"config": ["logger=wandb", "model.lora=default"], "reproduce": ["file=x"], "export": ["run=x"]}
    for primary in ("config", "evaluate", "export", "pretrain", "pairs", "figures", "reproduce", "plan"):
        cfg = config.compose(primary, given.get(primary, []))
        rules = config.rules(cfg)
        raw = OmegaConf.to_container(cfg, resolve=False)
        for key in config.keys(cfg):
            name = key.rpartition(".")[2]
            if (
                key.startswith("styles.")
                or name in free
                or key in rules
                or (primary, key) == ("evaluate", "parser")
            ):
                continue
            written = raw
            for part in key.split("."):
                written = written[part]
            assert str(written).startswith("${"), f"{key} has no rule, and follows no key that has one"


def test_null_is_all_held_out_rows_where_they_are_read_and_refused_where_they_are_made() -> None:
    for name in ("gsm8k", "math500", "humaneval", "mbpp"):
        assert config.build(config.compose("config", [f"task={name}"]).task).eval_size is None
    for name in ("sudoku", "countdown"):
        with pytest.raises(InputError, match=r"task\.eval_size=None: .*examples of this task are generated"):
            config.compose("config", [f"task={name}", "task.eval_size=null"])


MISTAKES = [
    (
        "estimator=mixtrue",
        ["mixtrue", "allowed: elbo, eubo, loose, mixture, zero", "nearest: estimator=mixture"],
    ),
    ("estimator@positive=elb", ["nearest: estimator@positive=elbo"]),
    ("task.fromat=template", ["'task.fromat'", "allowed here: task.format", "nearest: task.format"]),
    ("max_updates=3", ["nearest: trainer.max_updates"]),
    ("steps=3", ["nearest: decoding.steps or pretrain.steps"]),
    ("lr=1", ["pretrain.lr or optimizer.lr"]),
    ("learning_rate=3", ["there is no key 'learning_rate'"]),
    ("optimiser.lr=3", ["nearest: optimizer.lr"]),
    ("omega=1.5", ["omega=1.5", "allowed: a number from 0 to 1"]),
    ("beta=0", ["beta=0", "allowed: a number above 0"]),
    ("beta=abc", ["beta=abc"]),
    ("num_mc=2.5", ["allowed: a whole number, 1 or more"]),
    ("decoding.remasking=lowest", ["allowed: one of: low_confidence, random"]),
    ("optimizer.betas=[0.9]", ["allowed: two numbers"]),
    ("task.min_empty=12 task.max_empty=4", ["task.min_empty=12 is above task.max_empty=4"]),
    ("algorithm.normalization=elbo_weight", ["algorithm.objective.length_weighting=false"]),
    ("algorithm=wd1 beta=-1", ["beta=-1", "allowed: a number above 0"]),
    ("--multirun estimator=elbo,eubo beta=1,-1", ["beta=-1", "allowed: a number above 0"]),
    ("task=gsm8k task.parser=exact", ["task.parser=exact", "allowed: one of: math_verify, d1, spg"]),
    ("tuned.prompt_mask_prob=2 tuned=paper", ["tuned.prompt_mask_prob=2", "allowed: a number from 0 to 1"]),
    ("beta=1,2", ["--multirun"]),
    ("+nonsense=3", ["'nonsense'"]),
    ("+task.shorts=3", ["nearest: task.shots"]),
    ("beta", ["can't be read"]),
    ("~seed", ["'seed'", "can't be removed"]),
    ("experiment=spg_mixture_sudoku task=gsm8k", ["task=gsm8k has no setting format", "for another task"]),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes_are_answered_with_what_is_allowed(line: str, words: list[str]) -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.preflight("config", line.split())
    for word in words:
        assert word in str(caught.value)


def test_a_nested_group_is_chosen_with_a_dot_as_with_a_slash() -> None:
    for line in ("model.lora=paper", "model/lora=paper"):
        lora = config.compose("config", [line, "model.lora.alpha=32", "seed=7"]).model.lora
        assert (lora.r, lora.alpha, lora.targets, lora.seed) == (128, 32, "released", 7)
    assert config.compose("config", []).model.lora is None
    with pytest.raises(config.ConfigError, match="nearest: model/lora=paper"):
        config.compose("config", ["model.lora=papre"])


def test_what_must_be_given_is_said() -> None:
    with pytest.raises(config.ConfigError, match="file must be given"):
        config.compose("reproduce", [])


def test_processes_share_the_prompts_evenly() -> None:
    config.compose("config", ["trainer=ddp", "trainer.devices=4"])
    with pytest.raises(config.ConfigError, match=r"prompts_per_rollout=16 can't be shared out .*devices=3"):
        config.compose("config", ["trainer=ddp", "trainer.devices=3"])
    with pytest.raises(config.ConfigError, match="needs trainer=ddp"):
        config.compose("config", ["trainer.devices=2"])


def test_sweeps_are_checked_value_by_value() -> None:
    config.preflight("config", ["--multirun", "estimator=elbo,eubo", "beta=1,1.5", "seed=range(3)"])
    with pytest.raises(config.ConfigError, match="nearest: estimator=eubo"):
        config.preflight("config", ["--multirun", "estimator=elbo,eubbo"])
    with pytest.raises(config.ConfigError, match="omega=2"):
        config.preflight("config", ["--multirun", "omega=0,0.5,2"])


def test_the_answer_comes_fast_and_without_torch() -> None:
    code = (
        "import sys; from spg.cli import launch\n"
        "sys.argv = ['train', 'estimator=mixtrue']\n"
        "try:\n    launch.run('config', print)\n"
        "finally:\n    assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - started < 5
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "nearest: estimator=mixture" in done.stderr


def test_help_of_a_plan_names_its_own_keys_and_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    config.show_help("plan")
    text = capsys.readouterr().out
    for words in ("hardware=h100", "NVIDIA A100 SXM with 40 GB", "prompt_tokens=", "model=tiny", "num_mc=2"):
        assert words in text


def test_help_names_every_group_option_and_key() -> None:
    command = [sys.executable, "-m", "spg.train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for group, options in OPTIONS.items():
        if group == "hardware":  # only spg.plan has it
            continue
        assert f"{group}=" in text
        for option in options:
            assert f"  {option} " in text
    for key in ("beta=1.5", "task.format=template", "masking.prompt_mask_prob=0.15", "optimizer.lr="):
        assert key in text


def test_unread_knobs_are_named() -> None:
    assert config.unread_knobs(config.compose("config", [])) == []
    assert config.unread_knobs(config.compose("config", ["estimator=elbo"])) == ["beta", "omega"]
    assert config.unread_knobs(config.compose("config", ["estimator=eubo", "masking=random"])) == ["omega"]
    cfg = config.compose("config", ["estimator=elbo", "beta=2"])
    (line,) = config.notes(cfg, ["estimator=elbo", "beta=2.0"])
    assert "beta=2" in line
    assert config.notes(cfg, ["estimator=elbo"]) == [], "a default that is not read is no news"
    (line,) = config.notes(config.compose("config", ["beta=0.5"]), ["beta=0.5"])
    assert "not an upper bound" in line


def test_shipped_weights_fit_the_default_combination() -> None:
    from safetensors import safe_open

    from spg.models.base_weights import ASSETS, file_name, fingerprint_settings

    names = []
    for task in ("sudoku", "countdown"):
        cfg = config.compose("config", [f"task={task}"])
        path = ASSETS / file_name(cfg)
        assert path.is_file(), "the default combination's base weights must ship"
        assert path.stat().st_size < 4 * 2**20
        assert path.with_suffix(".md").is_file()
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["spg"]) == fingerprint_settings(cfg)
        names.append(path.name)
    assert sorted(p.name for p in ASSETS.glob("*.safetensors")) == sorted(names)
    path = ASSETS / names[0]
    for line in (
        "task.format=completion",
        "model.prompt_style=instruct",
        "pretrain.steps=31",
        "model.network.config.n_layers=2",
    ):
        assert not (ASSETS / file_name(config.compose("config", [line]))).exists()
    same = ("task.reward=rules", "seed=4", "task.eval_size=8", "optimizer.lr=1e-4")
    for line in (*same, "model.prompt_style=instruct task.prompt_style=bare"):
        assert file_name(config.compose("config", line.split())) == path.name


def test_an_edited_file_is_composed_anew(tmp_path: Path) -> None:
    """Composed configurations are reused only while no file that they could come from has changed."""
    option = tmp_path / "experiment" / "edited.yaml"
    option.parent.mkdir()
    for beta in (2.0, 3.0):
        option.write_text(f"# @package _global_\n# Edited between two commands.\nbeta: {beta}\n")
        with composition.open_hydra(tmp_path):
            assert composition.compose_open("config", ["experiment=edited"]).beta == beta


def test_lengths_and_steps_that_are_not_what_they_seem_are_told_of() -> None:
    def notes(*lines: str) -> str:
        return "\n".join(config.notes(config.compose("config", list(lines)), list(lines)))

    assert not notes()
    assert "decoding.steps=25 is above gen_length=24." in notes("decoding.steps=25")
    assert "so there are 24 steps at most" in notes("decoding.steps=25")
    assert "decoding.block_size=12 does not divide gen_length=25" in notes("gen_length=25")
    assert "The last block is shorter (1)." in notes("gen_length=25")
    both = notes("decoding.block_size=5")
    assert "decoding.block_size=5 does not divide gen_length=24" in both
    assert "masking" not in both
    assert "masking.block_size=5 does not" in notes("masking.block_size=5")


def test_base_weights_that_a_run_would_make_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPG_CACHE", str(tmp_path))
    assert base_weights.announce(config.compose("config", [])) is None
    assert base_weights.announce(config.compose("config", ["gen_length=25", "model.weights=random"])) is None
    told = base_weights.announce(config.compose("config", ["gen_length=25"])) or ""
    assert "no base weights for these settings. They are made first, by 15 supervised updates of 64" in told
    assert f"kept in {tmp_path}. With gen_length=24 (not 25) there would be weights already." in told
    (tmp_path / "base-broken.safetensors").write_bytes(b"\xff" * 20)
    far = base_weights.announce(config.compose("config", ["task.format=completion", "pretrain.seed=3"])) or ""
    assert "With model.weights=random, or a safetensors file, none are made." in far
    assert "there would be" not in far
