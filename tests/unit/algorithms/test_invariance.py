"""What must not change the loss, the gradient or the log-probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spg.algorithms.advantages import GroupMean
from spg.algorithms.estimators import ELBO, EUBO, Mixture, Sandwich
from spg.algorithms.masking import BlockRandom
from spg.algorithms.objectives.spg import SPG
from spg.config.settings import Optimization
from spg.core.types import Experience, MaskedSamples, UpdateBatch
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder
from spg.rollout.prompt_order import PromptStream
from spg.tasks.sudoku import Sudoku
from spg.training.module import Training
from tests.helpers import experience_of, small_policy

MASK = 2


def batch(seed: int) -> tuple[Experience, MaskedSamples]:
    """Return three groups of two made-up completions, with left padding, masked three times each."""
    groups, size, t, num_mc = 3, 2, 8, 3
    g = torch.Generator().manual_seed(seed)
    b = groups * size
    ends = torch.randint(1, t + 1, (b, 1), generator=g)
    holes = torch.arange(t) < ends
    advantages = GroupMean()(torch.rand(groups, size, generator=g)).flatten()
    pads = torch.randint(0, 3, (b, 1), generator=g)
    experience = experience_of(
        holes,
        advantages,
        group=torch.arange(groups).repeat_interleave(size),
        prompt_mask=torch.arange(4) >= pads,
        prompt_ids=torch.randint(5, 28, (b, 4), generator=g),
        completion_ids=torch.randint(5, 28, (b, t), generator=g),
    )
    samples = BlockRandom(4, num_mc)(experience.rollout, MASK, seed)
    return experience, samples


def value_and_gradient(
    loss_norm: str, logps: Tensor, samples: MaskedSamples, experience: Experience
) -> tuple[Tensor, Tensor]:
    leaf = logps.clone().requires_grad_()
    objective = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)), loss_norm)
    loss = objective(leaf, UpdateBatch.of(experience, samples)).loss
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["group", "batch"]))
def test_order_of_the_batch(seed: int, loss_norm: str) -> None:
    experience, samples = batch(seed)
    g = torch.Generator().manual_seed(seed)
    logps = -4 * torch.rand(samples.scored.shape, generator=g)
    order = torch.randperm(len(logps), generator=g)
    loss, gradient = value_and_gradient(loss_norm, logps, samples, experience)
    other, shuffled = value_and_gradient(
        loss_norm, logps[order], samples.select(order), experience.select(order)
    )
    assert torch.allclose(loss, other, atol=1e-6)
    assert torch.allclose(gradient[order], shuffled, atol=1e-7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_groups_are_averaged_and_batches_pooled(seed: int) -> None:
    """loss_norm=group is the mean of the groups' own losses; for one group both norms are the same."""
    experience, samples = batch(seed)
    logps = -4 * torch.rand(samples.scored.shape, generator=torch.Generator().manual_seed(seed))
    whole, _ = value_and_gradient("group", logps, samples, experience)
    alone = []
    for number in range(3):
        rows = (experience.rollout.group == number).nonzero().flatten()
        parts = (logps[rows], samples.select(rows), experience.select(rows))
        alone.append(value_and_gradient("group", *parts)[0])
        assert torch.allclose(alone[-1], value_and_gradient("batch", *parts)[0], atol=1e-6)
    assert torch.allclose(whole, torch.stack(alone).mean(), atol=1e-6)
    lengths = samples.lengths
    shares = torch.stack([lengths[experience.rollout.group == n].sum() for n in range(3)]) / lengths.sum()
    pooled, _ = value_and_gradient("batch", logps, samples, experience)
    assert torch.allclose(pooled, (torch.stack(alone) * shares).sum(), atol=1e-6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_left_padding(seed: int, extra: int) -> None:
    policy = small_policy()
    experience, samples = batch(seed)
    rollout = experience.rollout
    mask = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.given)], -1)
    tokens, scored = samples.tokens[:, 0], samples.scored[:, 0]
    pad = torch.zeros(len(tokens), extra, dtype=torch.long)
    with torch.no_grad():
        plain = policy.token_logps(tokens, mask, rollout.completion_ids, scored)
        padded = policy.token_logps(
            torch.cat([pad, tokens], -1),
            torch.cat([pad.bool(), mask], -1),
            rollout.completion_ids,
            scored,
        )
    assert torch.allclose(plain, padded, atol=1e-5)
    assert (plain[~scored] == 0).all()


def training(policy: Policy, estimator: str, micro_batch_size: int | None) -> Training:
    negative = {"mixture": Mixture(1.5, 0.5), "eubo": EUBO(2.0)}[estimator]
    decoder = Decoder(24, 12, 8)
    task = Sudoku(train_size=8, eval_size=8)
    return Training(
        policy,
        task,
        decoder,
        decoder,
        GroupMean(),
        BlockRandom(4, 3),
        SPG(Sandwich(ELBO(), negative)),
        Optimization(lr=1e-3),
        PromptStream(task.examples("train"), 2, 1, seed=0),
        mu=1,
        group_size=2,
        max_updates=1,
        seed=0,
        micro_batch_size=micro_batch_size,
    )


def gradient_of(
    estimator: str, micro_batch_size: int | None, seed: int
) -> tuple[float, Tensor, dict[str, Tensor]]:
    policy = small_policy()
    module = training(policy, estimator, micro_batch_size)
    result = module.gradient.add(module.prepare_batch(*batch(seed)))
    gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return float(result.loss), torch.cat(gradients), dict(result.figures)


@pytest.mark.parametrize("estimator", ["mixture", "eubo"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 17])
def test_micro_batches_change_no_gradient(estimator: str, micro_batch_size: int) -> None:
    """Cuts fall inside a sequence's draws too, which the EUBO joins inside its log."""
    for seed in (0, 1):
        loss, whole, metrics = gradient_of(estimator, None, seed)
        same, pieces, split_metrics = gradient_of(estimator, micro_batch_size, seed)
        assert same == pytest.approx(loss, abs=1e-6)
        assert torch.allclose(whole, pieces, atol=1e-6)
        assert metrics.keys() == split_metrics.keys()
        assert torch.allclose(metrics["bound/gap"], split_metrics["bound/gap"], atol=1e-5)


def test_sequences_without_advantage_are_not_computed_but_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experience, samples = batch(3)
    advantages = experience.advantages.clone()
    advantages[:2] = 0.0
    experience = Experience(experience.rollout, experience.rewards, {}, advantages)
    policy = small_policy()
    seen: list[int] = []
    original = policy.token_logps

    def spy(tokens: Tensor, *rest: Tensor) -> Tensor:
        seen.append(len(tokens))
        return original(tokens, *rest)

    monkeypatch.setattr(policy, "token_logps", spy)
    module = training(policy, "mixture", None)
    loss = module.gradient.add(module.prepare_batch(experience, samples)).loss
    assert seen == [4 * 3]
    rollout = experience.rollout
    mask = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.given)], -1)
    draws = zip(samples.tokens.unbind(1), samples.scored.unbind(1), strict=True)
    with torch.no_grad():
        every = [original(tokens, mask, rollout.completion_ids, scored) for tokens, scored in draws]
    expected = module.objective(torch.stack(every, 1), UpdateBatch.of(experience, samples)).loss
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
