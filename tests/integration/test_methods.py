"""Every method is a preset of parts: what it is made of, that it runs, and what must not change it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spg import config
from spg.algorithms.objectives import DPO, Objective, ObjectiveResult, coupling
from spg.cli.train import resume
from spg.core.files import read_csv
from spg.core.types import Experience, MaskedSamples, UpdateBatch
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder
from spg.training.module import Training
from spg.training.pieces import Copies
from spg.training.update import BackwardPasses
from tests.helpers import ROOT, open_prompts, same_run, small_policy, train_here
from tests.unit.algorithms.test_invariance import training
from tests.unit.config.test_configs import OPTIONS

METHODS = OPTIONS["algorithm"]
# preset: masking, advantage, objective, what it needs, num_mc
PARTS = {
    "spg": ("BlockRandom", "GroupMean", "SPG", set(), 2),
    "spg_eubo": ("BlockRandom", "GroupMean", "SPG", set(), 2),
    "d1": ("Full", "GroupMean", "GRPO", {"old", "reference"}, 1),
    "wd1": ("Full", "GroupMean", "WD1", set(), 1),
    "unigrpo": ("Spread", "Normalized", "GRPO", {"old", "reference"}, 2),
    "coupled_grpo": ("Complementary", "LeaveOneOut", "GRPO", {"old", "reference"}, 2),
    "espo": ("Complementary", "LeaveOneOut", "ESPO", {"old", "reference"}, 2),
    "vrpo": ("Random", "GroupMean", "DPO", {"reference"}, 8),
    "stepwise": ("Trajectory", "GroupMean", "GRPO", {"old"}, None),
    "reward_shift": ("BlockRandom", "Shifted", "SPG", set(), 2),
    "reward_shift_grpo": ("BlockRandom", "Shifted", "GRPO", {"old"}, 2),
}


def parts(*lines: str) -> tuple[Any, Any, Any]:
    """Return masking, advantage and objective of a command line."""
    cfg = config.compose("config", list(lines))
    return tuple(config.build(node) for node in (cfg.masking, cfg.advantage, cfg.algorithm.objective))


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_is_made_of_its_parts(method: str) -> None:
    masking, advantage, objective = parts(f"algorithm={method}", "tuned.method=null")
    names = tuple(type(part).__name__ for part in (masking, advantage, objective))
    found = (*names, set(objective.needs), getattr(masking, "num_mc", None))
    assert found == PARTS[method]


def test_each_part_of_a_preset_can_be_overridden() -> None:
    masking, advantage, objective = parts("algorithm=unigrpo", "masking=block_random", "num_mc=3")
    assert (type(masking).__name__, masking.num_mc, masking.prompt_mask_prob) == ("BlockRandom", 3, 0.15)
    assert (type(objective).__name__, objective.average) == ("GRPO", "draws")
    assert type(advantage).__name__ == "Normalized"
    lines = ["masking=block_random", "algorithm=d1", "advantage=leave_one_out"]  # in any order
    masking, advantage, objective = parts(*lines, "algorithm.objective.kl_coef=0")
    assert type(masking).__name__ == "BlockRandom"
    assert type(advantage).__name__ == "LeaveOneOut"
    assert objective.needs == {"old"}
    _, _, objective = parts("algorithm=wd1", "estimator=eubo", "beta=1.3")
    assert objective.estimator.beta == 1.3
    _, _, objective = parts("algorithm=reward_shift", "estimator@positive=mixture", "omega=0.25")
    assert (objective.sandwich.positive.omega, type(objective.sandwich.negative).__name__) == (0.25, "ELBO")


def test_what_a_method_does_not_read_is_told() -> None:
    lines = ["algorithm=d1", "estimator=eubo", "beta=2", "estimator@positive=eubo"]
    told = config.notes(config.compose("config", lines), lines)
    for word in ("beta=2", "estimator=eubo", "estimator@positive=eubo"):
        assert any(f"{word} is read by no selected part" in line for line in told), word
    lines = ["algorithm=stepwise", "num_mc=4", "estimator.smoothing=0.5"]
    told = config.notes(config.compose("config", lines), lines)
    assert [line.split(" is read")[0] for line in told] == [
        "Warning: num_mc=4",
        "Warning: estimator.smoothing=0.5",
    ]
    lines = ["algorithm=wd1", "estimator=eubo", "beta=2"]
    assert config.notes(config.compose("config", lines), lines) == []


REFUSED = [
    ("algorithm=vrpo group_size=4", "group_size=4, but DPO compares 2 completions.*give group_size=2"),
    ("algorithm=espo num_mc=3", "num_mc=3 is odd: complementary pairs.*set num_mc=4"),
    ("masking.draws=antithetic num_mc=5", "num_mc=5 is odd: antithetic pairs"),
    ("algorithm=wd1 algorithm.normalization=per_token", "WD1 needs log-likelihoods of whole sequences"),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_parts_that_do_not_fit_are_refused_before_a_run_begins(line: str, words: str) -> None:
    with pytest.raises(config.ConfigError, match=words):
        config.preflight("config", line.split())


@pytest.mark.parametrize("model", ["llada_8b", "tiny_a2d"])
def test_a_method_keeps_its_own_numbers_with_large_models(model: str) -> None:
    """What is set for all of a model's runs stands behind the method's own."""
    found = {}
    for method in METHODS:
        cfg = config.compose("config", [f"model={model}", "task=gsm8k", f"algorithm={method}"])
        found[method] = (cfg.masking.prompt_mask_prob, cfg.num_mc, cfg.mu, cfg.group_size)
    own = {"d1": (0.15, 1, 4, 6), "wd1": (0.15, 1, 4, 6), "vrpo": (0.0, 8, 1, 2)}
    own |= dict.fromkeys(("unigrpo", "coupled_grpo", "espo", "stepwise"), (0.0, 2, 4, 6))
    assert found == {method: own.get(method, (0.15, 2, 4, 6)) for method in METHODS}


@pytest.mark.long
def test_the_ablations_of_the_documentation_are_configuration_alone() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    table = text.split("Its ablations are configuration alone", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 10
    for row in rows:
        for line in re.findall(r"`([^`]+)`", row.split("|")[2]):
            if "," in line:
                config.preflight("config", ["--multirun", *line.split()])
            first = [re.sub(r"=.*,", "=", word) for word in line.split()]
            cfg = config.compose("config", first)
            assert config.notes(cfg, first) == [], line
            for node in (cfg.masking, cfg.algorithm.objective):
                config.build(node)


def test_every_method_is_documented_with_its_source() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    for method in METHODS:
        assert f"`{method}`" in text
    assert text.count("arXiv") >= 7, "each with its source"


def experience_for(policy: Policy, method: str) -> tuple[Experience, list[MaskedSamples], Training]:
    """Return a small policy's rollout with made-up rewards, the masks of two inner updates, and a module."""
    masking, advantage, objective = parts(f"algorithm={method}", "num_mc=2", "block_size=4")
    g = torch.Generator().manual_seed(3)
    pads = torch.tensor([0, 0, 2, 2, 1, 1, 0, 0]).unsqueeze(-1)
    prompts = open_prompts(torch.randint(5, 28, (8, 4), generator=g), 8, torch.arange(4) >= pads)
    size = 2 if method == "vrpo" else 4
    prompts = type(prompts)(**{**vars(prompts), "group": torch.arange(8) // size})
    rollout = Decoder(8, 4, 4, temperature=1.0)(policy, prompts, seed=0)
    rewards = torch.rand(8, generator=g)
    advantages = advantage(rewards.view(-1, size)).flatten()
    experience = Experience(rollout, rewards, {"all": rewards}, advantages)
    module = training(policy, "mixture", None)
    module.masking, module.objective = masking, objective
    if "reference" in objective.needs:
        policy.keep_reference()
    return experience, masking.rounds(rollout, policy.mask_id, [7, 8]), module


def moved(policy: Policy) -> None:
    """Let the policy be another than the one that made the rollout, and than the reference."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g)


def together(objective: Objective, experience: Experience, samples: MaskedSamples) -> list[int]:
    """Return how many masked copies of each sequence, or of each pair, the loss joins."""
    copies = (samples.scored.any(-1) & objective.learns_from(experience).unsqueeze(-1)).sum(-1)
    return (copies.view(-1, 2).sum(-1) if isinstance(objective, DPO) else copies).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_no_gradient_of_any_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of whole sequences, or of whole pairs, take one pass; others take two."""
    calls: list[tuple[bool, int]] = []
    original = Policy.token_logps

    def spy(policy: Policy, tokens: Tensor, *rest: Tensor) -> Tensor:
        calls.append((torch.is_grad_enabled(), len(tokens)))
        return original(policy, tokens, *rest)

    monkeypatch.setattr(Policy, "token_logps", spy)
    policy = small_policy()
    experience, rounds, module = experience_for(policy, method)
    batch = module.prepare_batch(experience, rounds[1], 1)
    assert (batch.old is not None) == ("old" in module.objective.needs)
    moved(policy)
    units = together(module.objective, experience, rounds[1])

    def gradient(size: int | None, two_passes: bool = False) -> tuple[ObjectiveResult, Tensor]:
        calls.clear()
        policy.zero_grad()
        module.micro_batch_size = size
        if two_passes:
            copies = Copies.of(batch, module.objective.learns_from(experience))
            parts = copies.cut_whole(size, coupling(module.objective))
            pieces = [piece for _, piece in parts]
            result = module.gradient._add_in_two_passes(batch, pieces, BackwardPasses())
        else:
            result = module.gradient.add(batch)
            assert not result.loss.requires_grad
        return result, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    whole, expected = gradient(None)
    assert expected.isfinite().all()
    assert float(expected.norm()) > 1e-3
    for size in (1, max(units), 2 * max(units) + 1):
        result, found = gradient(size)
        learning = [copies for with_gradient, copies in calls if with_gradient]
        assert sum(learning) == sum(units)
        assert max(learning) <= size
        one_pass = max(units) <= size
        assert len(calls) == len(learning) * (1 if one_pass else 2), size
        assert float((found - expected).norm() / expected.norm()) < 1e-6, size
        assert float(result.loss) == pytest.approx(float(whole.loss), rel=1e-6, abs=1e-7)
        assert result.figures.keys() == whole.figures.keys()
        for name, figure in result.figures.items():
            assert figure.shape == (8,)
            assert torch.allclose(figure, whole.figures[name], rtol=1e-6, atol=2e-6), name
        if size > max(units):  # the same pieces in two passes: the same sums
            other, same = gradient(size, two_passes=True)
            assert float((found - same).norm() / same.norm()) < 3e-7, size
            assert torch.equal(result.loss, other.loss.detach())
            assert all(torch.equal(result.figures[name], other.figures[name]) for name in other.figures)


@pytest.mark.parametrize("method", [m for m in METHODS if "old" in PARTS[m][3]])
def test_the_first_update_needs_no_old_policy_since_it_is_that(method: str) -> None:
    policy = small_policy()
    experience, rounds, module = experience_for(policy, method)
    first, later = (module.prepare_batch(experience, rounds[0], inner) for inner in (0, 1))
    assert first.old is None
    assert later.old is not None
    result = module.gradient.add(first)
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    again = module.gradient.add(later).loss
    other = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert float(result.loss) == pytest.approx(float(again), abs=1e-6)
    assert torch.allclose(gradient, other, atol=1e-6)
    learned = module.objective.learns_from(experience)
    assert torch.allclose(result.figures["ratio"][learned], torch.ones(int(learned.sum())))
    assert not result.figures["clip_ratio"].any()


def test_the_old_policy_is_the_one_before_the_rollout_s_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-probabilities are taken under the masks of each update, before any of them."""
    policy = small_policy()
    experience, rounds, module = experience_for(policy, "d1")
    before = module.prepare_batch(experience, rounds[1], 1).old
    seen: list[Tensor | None] = []

    def update(batch: UpdateBatch) -> dict[str, float]:
        seen.append(batch.old)
        moved(policy)
        return {}

    monkeypatch.setattr(module, "update", update)
    monkeypatch.setattr(module, "collect", lambda _: experience)
    monkeypatch.setattr(module.masking, "rounds", lambda *_: rounds)
    module.mu, module.max_updates = 2, 3
    module.training_step([], 0)
    assert seen[0] is None
    assert before is not None
    assert seen[1] is not None
    assert torch.equal(seen[1], before)


SHORT = (
    "trainer.max_updates=4",
    "mu=2",
    "trainer.validate_every=2",
    "trainer.checkpoint_every=2",
    "trainer.prompts_per_rollout=4",
    "trainer.samples_every=0",
    "task.eval_size=8",
)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("spg", "spg_eubo")])
def test_a_run_of_each_method(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train_here(tmp_path / "run", f"algorithm={method}", "group_size=2", *SHORT)
    rows = read_csv(tmp_path / "run" / "metrics.csv")[1:]
    assert [row["update"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row["grad_norm"]) > 0 for row in rows if float(row["masked_copies"]))
    if "old" in PARTS[method][3]:
        ratios = [float(row["ratio"]) for row in rows if float(row["masked_copies"])]
        assert float(rows[0]["ratio"]) == pytest.approx(1.0, abs=1e-6)
        assert any(abs(ratio - 1) > 1e-6 for ratio in ratios), "later updates see the older policy"
    slow = [record.message for record in caplog.records if "masked copies of a completion" in record.message]
    assert bool(slow) == (method in ("stepwise", "vrpo"))
    if slow:
        copies = float(rows[0]["masked_copies"])
        assert f"{copies:.1f} masked copies" in slow[0]
        assert "SPG's 2 would take about" in slow[0]


@pytest.mark.long
def test_a_run_with_an_old_policy_and_a_reference_resumes(tmp_path: Path) -> None:
    lines = ("algorithm=d1", *SHORT, "trainer.max_updates=6")
    train_here(tmp_path / "whole", *lines)
    train_here(tmp_path / "parts", *lines, "trainer.max_updates=2")

    resume(str(tmp_path / "parts"), ["trainer.max_updates=6"])
    assert same_run(tmp_path / "whole", tmp_path / "parts")


# updates of a run of about a minute, and by how much the sampled reward must have risen in it: in five seeds
# it rose by 0.15 or more, with the EUBO alone by 0.03 or more
RISES = {"stepwise": (160, 0.1), "spg_eubo": (320, 0.02)}
# no trace is made less likely, so that whatever the policy writes is reinforced, and nothing is learned
FLAT = ("reward_shift", "reward_shift_grpo")


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_the_reward_rises_within_a_minute(method: str, tmp_path: Path) -> None:
    updates, rise = RISES.get(method, (320, 0.1))
    train_here(
        tmp_path / "run",
        f"algorithm={method}",
        "experiment=null",
        "seed=1",
        f"trainer.max_updates={updates}",
        "trainer.validate_every=1000",
        "trainer.checkpoint_every=1000",
        "trainer.samples_every=0",
    )
    rewards = [float(r["reward"]) for r in read_csv(tmp_path / "run" / "metrics.csv") if r["reward"]]
    first, last = sum(rewards[:8]) / 8, sum(rewards[-8:]) / 8
    if method in FLAT:
        assert last < first + 0.03, (first, last)
    else:
        assert last > first + rise, (first, last)
