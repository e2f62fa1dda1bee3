"""The presets hold the paper's numbers, settings follow the model's scale, and the command line wins."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.cli.train import start
from spg.core.files import read_csv
from spg.runs.status import read_status

# G.2: task of a preset, its updates, temperature, beta of the mixture and of the EUBO alone
PAPER = {
    "gsm8k": ("gsm8k.GSM8K", 6000, 0.9, 1.5, 1.5),
    "math500": ("math500.Math500", 4000, 0.9, 1.5, 1.5),
    "countdown": ("countdown.Countdown", 6000, 0.9, 1.5, 2.0),
    "sudoku": ("sudoku.Sudoku", 2500, 0.3, 1.0, 1.0),
    "humaneval": ("humaneval.HumanEval", 6000, 0.9, 1.5, 1.5),
    "mbpp": ("mbpp.MBPP", 6000, 0.9, 1.5, 1.5),
}
# learning rates of full fine-tuning
FULL = {"math500": 2e-7, "countdown": 3e-7}
PRESETS = [f"spg_{estimator}_{task}" for estimator in ("mixture", "eubo") for task in PAPER]
PRESETS += [f"spg_mixture_{task}_full" for task in FULL]
LARGE = ("llada_8b", "llada_8b_base", "llada_1_5", "tiny_a2d")


def composed(line: str) -> DictConfig:
    """Return the configuration of a command line."""
    return config.compose("config", line.split())


def test_there_is_a_preset_for_each_run_of_the_paper() -> None:
    found = [path.stem for path in (config.CONF_DIR / "experiment").glob("spg_*.yaml")]
    assert sorted(found) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_numbers_of_the_paper(name: str) -> None:
    _, estimator, task, *full = name.split("_")
    target, updates, temperature, mixture, eubo = PAPER[task]
    cfg = composed(f"experiment={name} trainer=ddp trainer.devices=8")

    assert cfg.task._target_ == f"spg.tasks.{target}"
    assert cfg.task.reward == "released"
    assert cfg.trainer.max_updates == updates
    assert (cfg.mu, cfg.num_mc, cfg.group_size) == (4, 2, 6)
    assert cfg.trainer.validate_every == cfg.trainer.checkpoint_every == 100

    assert (cfg.trainer.strategy, cfg.trainer.devices) == ("ddp", 8)
    assert cfg.trainer.prompts_per_rollout * cfg.group_size == 96
    at_once, accumulation = (3, 4) if task == "sudoku" else (6, 2)
    assert cfg.trainer.prompts_per_rollout // 8 * cfg.group_size == at_once * accumulation
    assert cfg.trainer.micro_batch_size == at_once

    decoding = cfg.decoding
    assert (decoding.gen_length, decoding.block_size, decoding.steps) == (256, 32, 128)
    assert (decoding.temperature, decoding.remasking) == (temperature, "low_confidence")
    masking = cfg.masking
    assert (masking._target_, masking.block_size, masking.num_mc) == (
        "spg.algorithms.masking.BlockRandom",
        32,
        2,
    )
    assert (masking.prompt_mask_prob, masking.region) == (0.15, "to_eos")
    assert (masking.block_choice, masking.scored_positions) == ("released", "masked")

    objective = cfg.algorithm.objective
    assert (objective.loss_norm, objective.length_weighting, objective.kl_coef) == ("group", True, 0)
    assert objective.sandwich.positive._target_ == "spg.algorithms.estimators.ELBO"
    negative = objective.sandwich.negative
    if estimator == "mixture":
        assert (negative._target_, negative.omega) == ("spg.algorithms.estimators.Mixture", 0.5)
        assert cfg.beta == mixture
    else:
        assert (negative._target_, cfg.beta) == ("spg.algorithms.estimators.EUBO", eubo)
    assert cfg.advantage._target_ == "spg.algorithms.advantages.GroupMean"

    optimizer = cfg.optimizer
    assert (list(optimizer.betas), optimizer.weight_decay, optimizer.max_grad_norm) == ([0.9, 0.99], 0.1, 0.2)
    assert optimizer.warmup_updates == max(1, int(6000 * 1e-4))
    assert optimizer.lr == (FULL[task] if full else 3e-6)

    assert cfg.model.path == "GSAI-ML/LLaDA-8B-Instruct"
    lora = cfg.model.lora
    if full:
        assert lora is None
        assert cfg.model.checkpointing
    else:
        assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (128, 64, 0.05, "released")


def test_presets_ask_for_their_task_as_the_paper_does() -> None:
    sudoku = composed("experiment=spg_mixture_sudoku").task
    assert (sudoku.format, sudoku.prompt_style, sudoku.shots) == ("completion", "instruct", 3)
    countdown = composed("experiment=spg_eubo_countdown").task
    assert (countdown.prompt_style, countdown.numbers, countdown.train_path) == ("instruct", 3, "hub")
    assert sudoku.parser == countdown.parser == "spg"


def test_the_command_line_wins_over_a_preset() -> None:
    cfg = composed("experiment=spg_mixture_gsm8k model=llada_toy beta=1.0 optimizer.lr=1e-3 estimator=eubo")
    assert (cfg.beta, cfg.optimizer.lr, cfg.model.weights) == (1.0, 1e-3, "random")
    assert cfg.algorithm.objective.sandwich.negative._target_ == "spg.algorithms.estimators.EUBO"
    assert (cfg.trainer.max_updates, cfg.group_size, cfg.trainer.devices) == (6000, 6, 1)
    cfg = composed("experiment=spg_mixture_sudoku gen_length=512 task.reward=intended")
    assert (cfg.decoding.steps, cfg.decoding.block_size, cfg.task.reward) == (256, 32, "intended")
    assert composed("experiment=spg_mixture_countdown_full model/lora=paper").model.lora.r == 128
    cfg = composed("experiment=spg_mixture_countdown model=tiny")
    assert (cfg.masking.scored_positions, cfg.optimizer.lr) == ("masked", 3e-6), "nothing of the tiny model's"
    assert (cfg.task.prompt_style, cfg.gen_length) == ("bare", 16), "but what it reads"


@pytest.mark.parametrize("model", LARGE)
def test_large_models_have_settings_of_their_own(model: str) -> None:
    cfg = composed(f"model={model} task=sudoku")
    assert (cfg.optimizer.lr, cfg.optimizer.warmup_updates, cfg.group_size, cfg.mu) == (3e-6, 1, 6, 4)
    assert (cfg.beta, cfg.decoding.temperature, cfg.gen_length) == (1.0, 0.3, 256)
    cfg = composed(f"model={model} task=countdown")
    assert (cfg.beta, cfg.decoding.temperature, cfg.masking.scored_positions) == (1.5, 0.9, "masked")


# by the style of prompts, as in G.1: settings of the task, then length, block and steps
ASKED = {
    ("sudoku", "bare"): ({"format": "template", "shots": 0}, (24, 12, 8)),
    ("sudoku", "instruct"): ({"format": "completion", "shots": 3}, (256, 32, 128)),
    ("countdown", "bare"): ({"operations": "+-", "max_number": 9, "max_target": 99}, (16, 4, 16)),
    ("countdown", "instruct"): ({"operations": "+-*/", "max_number": 100, "max_target": 100}, (256, 32, 128)),
}


@pytest.mark.parametrize("primary", ["config", "evaluate", "pretrain"])
@pytest.mark.parametrize("task", ["sudoku", "countdown"])
def test_the_model_decides_how_it_is_asked(primary: str, task: str) -> None:
    for model in ("tiny", "llada_8b") if primary == "pretrain" else ("tiny", "llada_toy", *LARGE):
        cfg = config.compose(primary, [f"model={model}", f"task={task}"])
        style = "bare" if model == "tiny" else "instruct"
        settings, sizes = ASKED[task, style]
        assert cfg.task.prompt_style == cfg.model.prompt_style == style
        assert {key: cfg.task[key] for key in settings} == settings
        decoding = cfg.decoding
        assert (decoding.gen_length, decoding.block_size, decoding.steps) == sizes
        assert (cfg.gen_length, cfg.block_size) == sizes[:2]


@pytest.mark.parametrize("primary", ["config", "evaluate", "pretrain"])
def test_each_part_of_a_style_can_be_given(primary: str) -> None:
    def of(line: str) -> DictConfig:
        return config.compose(primary, f"model=llada_8b {line}".split())

    cfg = of("task=countdown gen_length=64 block_size=16 task.max_number=50 task.shots=2")
    assert (cfg.decoding.gen_length, cfg.decoding.block_size, cfg.decoding.steps) == (64, 16, 32)
    assert (cfg.task.max_number, cfg.task.operations, cfg.task.shots) == (50, "+-*/", 2)
    assert of("task=countdown decoding.steps=256").decoding.steps == 256
    cfg = of("task.shots=0")
    assert (cfg.task.format, cfg.task.shots, cfg.gen_length) == ("completion", 0, 256)
    for line in ("task.prompt_style=bare", "model.prompt_style=bare"):
        cfg = of(line)
        assert (cfg.task.format, cfg.task.shots, cfg.gen_length, cfg.decoding.steps) == ("template", 0, 24, 8)
    cfg = of("task.prompt_style=bare task.format=completion")
    assert (cfg.gen_length, cfg.block_size, cfg.decoding.steps) == (16, 8, 8)


def test_a_template_fits_in_its_length_in_either_style() -> None:
    for line in ("model=tiny", "model=llada_toy task.format=template"):
        cfg = composed(line)
        task, tokenizer = config.build(cfg.task), config.build(cfg.model.tokenizer)
        # llada_toy has a token for each character, which is the most that one can take
        assert len(tokenizer.encode(task.target(task.examples("test")[0]))) <= cfg.gen_length


def test_a_model_without_a_style_is_asked_barely() -> None:
    cfg = composed("")
    OmegaConf.set_struct(cfg, False)
    del cfg.model["prompt_style"]  # a user's own, of before there was the key
    OmegaConf.set_struct(cfg, True)
    config.check(cfg)
    assert (cfg.task.prompt_style, cfg.task.shots, cfg.gen_length) == ("bare", 0, 24)


def test_settings_of_large_models_fit_what_the_user_chooses() -> None:
    cfg = composed("model=llada_8b task=gsm8k estimator=mixture beta=1.2")
    assert (cfg.beta, cfg.optimizer.lr, cfg.task.reward) == (1.2, 3e-6, "intended")
    assert composed("model=llada_8b task=sudoku task.format=template").gen_length == 48
    problem = config.build(composed("model=llada_8b task=countdown task.train_size=50").task).examples(
        "train"
    )[7]
    assert len(problem["numbers"]) == 3


def test_small_models_keep_theirs() -> None:
    for line in ("", "model=llada_toy"):
        cfg = composed(line)
        assert (cfg.optimizer.lr, cfg.group_size, cfg.decoding.temperature) == (1.5e-4, 8, 0.9)
        assert "tuned" not in cfg
    cfg = composed("task=countdown")
    assert (cfg.optimizer.lr, cfg.mu, cfg.decoding.temperature) == (5e-5, 2, 0.5)
    assert (cfg.masking.scored_positions, cfg.trainer.max_updates) == ("block", 2000)
    assert composed("task=countdown model=llada_toy").optimizer.lr == 1.5e-4
    assert composed("tuned=paper").optimizer.lr == 3e-6


def test_none_of_a_group_may_be_chosen_where_that_means_something() -> None:
    assert composed("model=llada_8b model/lora=null").model.lora is None
    assert composed("model=llada_8b model.lora=null").model.lora is None
    assert composed("model=llada_8b tuned=null task=gsm8k").optimizer.lr == 1.5e-4
    assert composed("tuned/task=null task=countdown").mu == 4
    with pytest.raises(config.ConfigError, match="task has no option 'null'; allowed: countdown"):
        composed("task=null")


def test_processes_wait_for_rollouts_of_minutes() -> None:
    from spg.training.run import PATIENCE, make_strategy
    from spg.training.settings import TrainerSettings

    def settings(strategy: str) -> TrainerSettings:
        return TrainerSettings.of({**composed("").trainer, "strategy": strategy})

    assert timedelta(hours=1) < PATIENCE == vars(make_strategy(settings("ddp")))["_timeout"]
    assert make_strategy(settings("auto")) == "auto"


def test_a_preset_runs_at_toy_size(tmp_path: Path) -> None:
    made = [{"question": f"What is {n} plus {n}?", "answer": f"{n} + {n}\n#### {2 * n}"} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, made)))
    small = f"model=llada_toy task.path={data} task.train_path={data} mu=2 gen_length=8 block_size=4"
    brief = "trainer.max_updates=2 trainer.prompts_per_rollout=2 trainer.threads=1 trainer.accelerator=cpu"
    folder = tmp_path / "run"
    start(composed(f"experiment=spg_mixture_gsm8k {small} {brief}"), folder, [])
    assert read_status(folder)["state"] == "finished"
    assert [row["update"] for row in read_csv(folder / "metrics.csv") if row["loss"]] == ["1", "2"]
    assert (folder / "adapter" / "adapter_config.json").is_file()
