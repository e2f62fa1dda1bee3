"""A plan says what the real code takes, whether it fits, and what to change."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from spg import config
from spg.cli.plan import job
from spg.config import ConfigError, build
from spg.planning import measure as measuring
from spg.planning.measure import Measure
from spg.planning.phantom import Work
from spg.planning.plan import Planner, largest_that_fits
from spg.planning.policy import Call, PlannedPolicy
from spg.planning.stand_ins import prompting
from tests.helpers import ROOT

SMALL = [
    "model=llada_toy",
    "task=sudoku",
    "task.shots=0",
    "gen_length=16",
    "block_size=8",
    "group_size=2",
    "trainer.prompts_per_rollout=2",
    "trainer.eval_batch_size=4",
    "trainer.max_updates=8",
]


def measure_of(*lines: str) -> Measure:
    cfg = config.compose("plan", [*SMALL, *lines])
    return Measure(cfg, build(cfg.hardware), build(cfg.assumptions), prompting(cfg))


@pytest.mark.long
@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_the_work_between_measured_questions_is_that_of_all(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = measure_of(f"decoding.cache={cache}", "decoding.steps=16")
    part, _ = made.rollout()
    monkeypatch.setattr(measuring, "_corners", lambda family: family)  # all of them

    def add_up(found: dict[Call, Work], calls: Sequence[Call]) -> Work:
        return functools.reduce(measuring._add, [found[call] for call in calls])

    monkeypatch.setattr(measuring, "_between", add_up)
    whole, _ = measure_of(f"decoding.cache={cache}", "decoding.steps=16").rollout()
    assert part.work.operations == pytest.approx(whole.work.operations, rel=1e-6)
    assert part.work.moved == pytest.approx(whole.work.moved, rel=0.02)
    assert part.bytes == pytest.approx(whole.bytes, rel=0.02)


def test_an_update_in_pieces_counts_all_pieces_and_needs_less() -> None:
    made = measure_of("num_mc=3")
    _, experience = made.rollout()
    batch = made.batch(experience)
    (whole, _), (pieces, _) = made.update(batch, None), made.update(batch, 3)
    assert pieces.bytes < whole.bytes
    assert pieces.work.operations == pytest.approx(whole.work.operations, rel=0.1)
    assert made.pass_alone(batch, 3) >= 0.9 * pieces.bytes


@pytest.mark.parametrize("method", ["vrpo", "wd1"])
def test_pieces_of_methods_that_compare_within_a_group_are_measured(method: str) -> None:
    made = measure_of(f"algorithm={method}", "num_mc=2", "trainer.prompts_per_rollout=4")
    batch = made.batch(made.rollout()[1])
    sizes = [made.pass_alone(batch, size) for size in (1, 3, 6)]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert made.update(batch, 3)[0].bytes > 0


def test_the_first_pass_of_an_update_has_no_gradients_before_it() -> None:
    made = measure_of("num_mc=2", "model.lora=null", "model.dtype=float32")
    batch = made.batch(made.rollout()[1])
    masked = batch.samples.scored.any(-1).numel()
    gradients = 4 * made.trained
    assert made.pass_alone(batch, masked) < made.pass_alone(batch, masked - 1)
    assert made.pass_alone(batch, masked) > gradients


def test_other_policies_and_copies_are_counted() -> None:
    plain = measure_of("algorithm=unigrpo", "model.lora=null")
    assert plain.held().reference == plain.held().weights
    _, experience = plain.rollout()
    _, before = plain.update(plain.batch(experience), None)
    assert before.work.operations > 0, "log-probabilities of the old and the reference policy"
    sliced = measure_of("model.lora=null", "trainer=fsdp", "trainer.devices=2").held()
    assert sliced.slices * 2 == plain.held().gradients
    assert sliced.optimizer == 2 * sliced.slices


@pytest.mark.long
def test_four_bits_take_a_quarter_of_bfloat16() -> None:
    wide = ["model.network.config.d_model=384", "model.network.config.mlp_hidden_size=1024"]
    usual = measure_of(*wide, "model.dtype=bfloat16", "model.precision=bf16-mixed")
    packed = measure_of(*wide, "model.dtype=bfloat16", "model.precision=bf16-mixed", "model.quantization=nf4")
    matrices = sum(
        p.numel()
        for layer in usual.policy.network.layers
        for n, p in layer.named_parameters()
        if p.ndim == 2 and "lora" not in n
    )
    saved = usual.weights - packed.weights
    assert saved == pytest.approx(matrices * (2 - 0.5 - 1 / 64), rel=0.01)
    _, experience = packed.rollout()
    part, _ = packed.update(packed.batch(experience), None)
    assert part.work.operations > 0


@pytest.mark.parametrize(("limit", "most"), [(5.0, 5), (0.5, 0), (100.0, 24), (23.9, 23), (1.5, 1)])
def test_the_largest_size_that_fits_is_found_in_few_steps(limit: float, most: int) -> None:
    tried = []

    def share(size: int) -> float:
        tried.append(size)
        return (1 + size) / (1 + limit)

    assert largest_that_fits(share, 24) == most
    assert len(tried) <= 5


def test_a_run_that_does_not_fit_is_told_what_to_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    lines = ["hardware=rtx_4090", "assumptions.context_gib=0", f"output={output}"]
    cfg = config.compose("plan", [*SMALL, *lines])
    planner = Planner(cfg, build(cfg.hardware), build(cfg.assumptions), prompting(cfg))
    needed = planner.needed(planner.update, gradients=False) / 2**30
    rest = planner.needed(planner.rollout, gradients=True) / 2**30
    assert rest < needed
    limit = (max(rest, needed / 2) + needed) / 2
    with caplog.at_level(logging.INFO):
        job(config.compose("plan", [*SMALL, *lines, f"hardware.memory_gib={limit}"]))
    said = caplog.text + capsys.readouterr().out
    for words in ("does NOT fit", "trainer.micro_batch_size=", "an estimate", "RTX 4090"):
        assert words in said
    saved = json.loads(output.read_text())
    assert saved["fits"] is False
    assert saved["peak_bytes"] > 2**30 * limit
    assert 0 < saved["largest_micro_batch"]["no checkpointing"] < 8


def test_several_processes_are_planned_as_ddp(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config.compose("plan", [*SMALL, "trainer.devices=2"])
    with caplog.at_level(logging.INFO):
        job(cfg)
    assert cfg.trainer.strategy == "ddp"
    assert "Planned with trainer=ddp" in caplog.text


def test_a_plan_is_of_a_new_run() -> None:
    with pytest.raises(ConfigError, match="a plan is of a new run"):
        job(config.compose("plan", [*SMALL, "resume=somewhere"]))


def test_hardware_is_named_right_before_torch_is_imported() -> None:
    with pytest.raises(ConfigError, match=r"allowed: a100, a100_40, cpu, h100, .*nearest: hardware=h100"):
        config.preflight("plan", ["hardware=h10"])


def test_prompts_are_assumed_where_they_would_be_fetched() -> None:
    cfg = config.compose("plan", ["model=llada_8b", "task=gsm8k"])
    found = prompting(cfg)
    assert (found.tokens, found.measured) == (200, False)
    assert (
        prompting(config.compose("plan", ["model=llada_8b", "task=gsm8k", "prompt_tokens=33"])).tokens == 33
    )
    assert prompting(config.compose("plan", SMALL)).measured


def test_answers_are_ordinary_tokens() -> None:
    made = measure_of()
    _, experience = made.rollout()
    ids = experience.rollout.completion_ids
    policy = made.policy
    assert isinstance(policy, PlannedPolicy)
    assert not torch.isin(ids, torch.tensor([policy.mask_id, policy.eos_id])).any()
    assert (experience.advantages != 0).all()


RESIDENT = [
    "model=llada_toy",
    *(f"model.network.config.{name}" for name in ("d_model=256", "n_layers=4", "mlp_hidden_size=768")),
    *(f"model.network.config.{name}=32000" for name in ("vocab_size", "embedding_size")),
    *["task=sudoku", "task.shots=0", "masking.region=all", "decoding.stop_at_eos=false", "gen_length=64"],
    *["block_size=32", "decoding.steps=4", "group_size=6", "trainer.prompts_per_rollout=1"],
    *["trainer.eval_batch_size=6", "trainer.max_updates=4", "mu=1"],
]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of resident memory")
@pytest.mark.parametrize(
    "more", [[], ["trainer.micro_batch_size=6", "algorithm=unigrpo"], ["decoding.cache=prefix"]]
)
def test_the_plan_is_within_a_tenth_of_measured_memory(more: list[str]) -> None:
    cfg = config.compose("plan", [*RESIDENT, *more, "hardware=cpu"])
    made = Measure(cfg, build(cfg.hardware), build(cfg.assumptions), prompting(cfg))
    rollout, experience = made.rollout()
    update, _ = made.update(made.batch(experience), cfg.trainer.micro_batch_size)
    planned = {"rollout": rollout.bytes, "update": update.bytes, "evaluation": made.evaluation(6).bytes}
    # what is freed goes back at once: else a heap with holes between tensors of unlike sizes counts
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "131072"}
    for part, expected in planned.items():
        command = [sys.executable, "-m", "tests.unit.planning.resident", part, *RESIDENT, *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert expected == pytest.approx(int(done.stdout), rel=0.1), part
