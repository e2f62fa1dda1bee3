"""The update without logits: losses and gradients are those of the plain way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spg import config
from spg.algorithms.objectives.spg import SPG
from spg.core.types import Experience, MaskedSamples, UpdateBatch
from spg.core.world import World
from spg.models import head
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.lora import LoRA
from spg.models.policy import Policy
from spg.training.module import Training
from spg.training.update import longest_learned
from tests.helpers import Ids
from tests.unit.algorithms.test_invariance import batch, training
from tests.unit.config.test_configs import OPTIONS


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a small head as a wide one: 7 positions' logits at once, none kept."""
    monkeypatch.setattr(head, "FEW", 0)
    monkeypatch.setattr(head, "rows_at_once", lambda vocabulary, device: 7)


def wide(seed: int = 0) -> Policy:
    """Return a policy with a head of 131 rows."""
    network = LLaDA(LLaDAConfig(32, 2, 2, 2, 48, vocab_size=131, embedding_size=131), seed=seed)
    return Policy(network, Ids(mask=126, eos=120, pad=120))


def plainly(policy: Policy, experience: Experience, samples: MaskedSamples, objective: SPG) -> Tensor:
    """Return the loss with logits at every position and a log-softmax over the whole vocabulary."""
    rollout = experience.rollout
    m, width = samples.scored.shape[1], rollout.prompt_ids.shape[1]
    tokens = samples.tokens.flatten(0, 1)
    mask = rollout.attention_mask.repeat_interleave(m, 0)
    logits = policy.network.logits(policy.network.hidden(tokens, mask))[:, width:].float()
    targets = rollout.completion_ids.repeat_interleave(m, 0)
    logps = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).view(samples.scored.shape)
    return objective(logps * samples.scored, UpdateBatch.of(experience, samples)).loss


def gradient(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def updating(policy: Policy, objective: SPG, size: int | None) -> Training:
    """Return a module that only computes losses and gradients."""
    module = training(policy, "mixture", size)
    module.objective = objective
    return module


def whole(policy: Policy) -> None:
    """Train everything."""


def frozen_head(policy: Policy) -> None:
    policy.network.head.requires_grad_(False)


def adapter(policy: Policy) -> None:
    policy.adapt(LoRA(4, 8, 0.0, "all"))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("estimator", OPTIONS["estimator"])
@pytest.mark.parametrize("trained", [whole, frozen_head, adapter])
@pytest.mark.parametrize("size", [None, 5])
def test_loss_and_gradient_are_those_of_the_plain_way(
    estimator: str, trained: Callable[[Policy], None], size: int | None
) -> None:
    objective = config.build(config.compose("config", [f"estimator={estimator}"]).algorithm.objective)
    policy = wide()
    trained(policy)
    experience, samples = batch(1)
    module = updating(policy, objective, size)
    for checkpointing in (False, True):
        policy.network.checkpointing = checkpointing
        policy.zero_grad()
        loss = module.gradient.add(module.prepare_batch(experience, samples)).loss
        lean = gradient(policy)
        policy.network.checkpointing = False
        policy.zero_grad()
        expected = plainly(policy, experience, samples, objective)
        expected.backward()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-7)
        assert torch.allclose(lean, gradient(policy), atol=1e-5 * float(gradient(policy).abs().max()))


def test_log_probabilities_and_their_derivatives_are_exact() -> None:
    """In float64, by finite differences, for a frozen and a trained head."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 6, generator=g, dtype=torch.double, requires_grad=True)
    weight = torch.randn(131, 6, generator=g, dtype=torch.double)
    targets = torch.randint(0, 131, (20,), generator=g)
    expected = F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(head.token_logps(hidden, weight, targets).double(), expected, atol=1e-5)
    up = torch.randn(20, generator=g)
    for trains in (False, True):
        weight.requires_grad_(trains)
        inputs = (hidden, weight) if trains else (hidden,)
        expected = F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        ours = torch.autograd.grad((head.token_logps(hidden, weight, targets) * up).sum(), inputs)
        theirs = torch.autograd.grad((expected * up).sum(), inputs)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(131, 8)
    for trains in (False, True):
        kept: list[int] = []
        weight.requires_grad_(trains)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, k=kept: k.append(t.numel()) or t, lambda t: t
        ):
            head.token_logps(hidden, weight, torch.zeros(40, dtype=torch.long))
        assert max(kept) < 40 * 131


def test_in_bfloat16_the_softmax_is_in_float32() -> None:
    policy = wide()
    mixed = Policy(policy.network, policy.tokenizer, "bf16-mixed")
    experience, samples = batch(1)
    rollout = experience.rollout
    args = (samples.tokens[:, 0], rollout.attention_mask, rollout.completion_ids, samples.scored[:, 0])
    ours, exact = mixed.token_logps(*args), policy.token_logps(*args)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, exact)
    assert torch.allclose(ours, exact, atol=0.1)
    with mixed.autocast():
        states = mixed.network.hidden(samples.tokens[:, 0], rollout.attention_mask)
        logits = mixed.network.logits(states)
    assert logits.dtype == torch.bfloat16
    width = rollout.prompt_ids.shape[1]
    expected = logits[:, width:].float().log_softmax(-1)
    expected = expected.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1) * samples.scored[:, 0]
    assert torch.allclose(ours, expected, atol=0.02), "bf16 logits, float32 from there on"
    assert not torch.equal(ours, ours.bfloat16().float())


def test_what_no_one_sees_is_cut_off_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that all prompts of a piece have: one to the left of every row changes nothing but the time."""
    policy = wide()
    experience, samples = batch(1)
    rollout = experience.rollout
    wider = replace(
        rollout,
        prompt_ids=F.pad(rollout.prompt_ids, (4, 0), value=120),
        prompt_mask=F.pad(rollout.prompt_mask, (4, 0)),
    )
    padded = replace(samples, tokens=F.pad(samples.tokens, (4, 0), value=120))
    widths: list[int] = []
    original = policy.token_logps
    monkeypatch.setattr(policy, "token_logps", lambda t, *a: widths.append(t.shape[1]) or original(t, *a))
    objective = config.build(config.compose("config", []).algorithm.objective)
    module = updating(policy, objective, None)
    one = module.gradient.add(module.prepare_batch(experience, samples)).loss
    two = module.gradient.add(module.prepare_batch(replace(experience, rollout=wider), padded)).loss
    assert widths[0] == widths[1]
    assert float(one) == pytest.approx(float(two), rel=1e-6)


def test_completions_are_cut_to_the_longest_that_is_learned_from() -> None:
    objective = config.build(config.compose("config", []).algorithm.objective)
    experience, samples = batch(1)
    learned = objective.learns_from(experience)
    reach = longest_learned(experience, samples, objective, World())
    ends = [int(row.nonzero().max()) + 1 for row in samples.region[learned]]
    assert reach == max(ends)
    shorter = samples.region.clone()
    shorter[:, 3:] = False
    few = replace(samples, region=shorter, scored=samples.scored & shorter.unsqueeze(1))
    assert longest_learned(experience, few, objective, World()) == 3
    cut, rows = few.truncate(3), experience.rollout.truncate(3)
    assert cut.tokens.shape[-1] == samples.tokens.shape[-1] - samples.region.shape[-1] + 3
    assert torch.equal(cut.tokens, few.tokens[..., : cut.tokens.shape[-1]])
    assert rows.completion_ids.shape[1] == rows.given.shape[1] == rows.commit_logps.shape[1] == 3
    nothing = replace(experience, advantages=experience.advantages * 0)
    assert longest_learned(nothing, few, objective, World()) == 1
