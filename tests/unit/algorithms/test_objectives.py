"""Objectives of the other methods: closed forms, invariances, exact gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spg.algorithms.estimators import ELBO, EUBO
from spg.algorithms.objectives import Objective
from spg.algorithms.objectives.dpo import DPO
from spg.algorithms.objectives.espo import ESPO
from spg.algorithms.objectives.grpo import GRPO
from spg.algorithms.objectives.terms import LARGEST_LOG_RATIO, clip_surrogate
from spg.algorithms.objectives.wd1 import WD1
from spg.core.types import Cohort, Experience, MaskedSamples, UpdateBatch
from tests.helpers import experience_of

SUMS = ELBO("elbo_weight")
MAKE: dict[str, Callable[[], Objective]] = {
    "d1": lambda: GRPO(0.2, kl_coef=0.04),
    "d1 batch": lambda: GRPO(0.2, loss_norm="batch", kl_coef=0.04, kl_estimator="k2"),
    "unigrpo": lambda: GRPO(
        0.2, average="draws", loss_norm="batch", kl_coef=0.1, kl_to="old", kl_average="sum"
    ),
    "unigrpo group": lambda: GRPO(0.2, average="draws", kl_coef=0.1, kl_estimator="k1", kl_average="sum"),
    "summed": lambda: GRPO(0.2, average="sum", kl_coef=0.1),
    "step": lambda: GRPO(0.2, ratio="step", average="sum", epsilon_high=0.4),
    "step draws": lambda: GRPO(0.2, ratio="step", average="draws", loss_norm="batch", kl_coef=0.1),
    "espo": lambda: ESPO(SUMS, 0.02, 0.04, 0.1),
    "espo batch": lambda: ESPO(SUMS, 0.02, kl_coef=0.0, loss_norm="batch"),
    "wd1": lambda: WD1(SUMS),
    "wd1 batch": lambda: WD1(SUMS, loss_norm="batch"),
    "wd1 positive": lambda: WD1(SUMS, positive_only=True),
    "dpo": lambda: DPO(SUMS, 0.1, 0.3),
}


def case(
    seed: int, groups: int = 3, size: int = 2, m: int = 3, t: int = 6
) -> tuple[MaskedSamples, Experience, list[Tensor]]:
    """Return samples, experience and log-probabilities [B M T] of three policies, one draw without a token.

    The second group's advantages are equal; completions differ in length.
    """
    g = torch.Generator().manual_seed(seed)
    b = groups * size
    region = torch.arange(t) < torch.randint(2, t + 1, (b, 1), generator=g)
    scored = (torch.rand(b, m, t, generator=g) < 0.6) & region.unsqueeze(1)
    scored[:, :, 0] |= ~scored.any(-1)
    scored[0, 1] = False
    counts = scored.sum(-1, keepdim=True)
    weight = scored * region.sum(-1)[:, None, None] / counts.clamp_min(1)
    samples = MaskedSamples(torch.zeros(b, m, 3 + t, dtype=torch.long), scored, weight, region)
    advantages = torch.randn(groups, size, generator=g)
    advantages = advantages - advantages.mean(-1, keepdim=True)
    advantages[1] = 0.0
    group = torch.arange(groups).repeat_interleave(size) + 5
    experience = experience_of(region, advantages.flatten(), group=group)
    base = -3 * torch.rand(b, m, t, generator=g)
    logps = [(base + 0.3 * torch.randn(b, m, t, generator=g)) * scored for _ in range(3)]
    return samples, experience, logps


def taken(
    objective: Objective,
    logps: Tensor,
    samples: MaskedSamples,
    experience: Experience,
    reference: Tensor | None = None,
    old: Tensor | None = None,
    cohort: Cohort | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return loss, its gradient with respect to `logps` (0 for sequences not learned from), and figures."""
    learned = objective.learns_from(experience)[:, None, None]
    leaf = (logps * learned).clone().requires_grad_()
    reference = None if reference is None else reference * learned
    old = None if old is None else old * learned
    cohort = cohort or Cohort.of(experience, samples)
    result = objective(leaf, UpdateBatch(experience, samples, cohort, old, reference))
    loss, figures = result.loss, result.figures
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, figures


@pytest.mark.parametrize("name", MAKE)
def test_what_is_not_learned_from_or_not_scored_changes_nothing(name: str) -> None:
    samples, experience, (new, old, reference) = case(1)
    objective = MAKE[name]()
    learned = objective.learns_from(experience)
    assert learned.any()
    loss, gradient, figures = taken(objective, new, samples, experience, reference, old)
    whole = new.clone().requires_grad_()
    same = objective(whole, UpdateBatch.of(experience, samples, old=old, reference=reference)).loss
    same.backward()
    assert whole.grad is not None
    assert loss.item() == pytest.approx(same.item(), abs=1e-6)
    assert torch.allclose(gradient, whole.grad, atol=1e-7)
    assert not gradient[~samples.scored].any()
    assert not gradient[~learned].any()
    assert bool(gradient[learned].flatten(1).any(1).any())
    assert all(figure.shape == (6,) and not figure.requires_grad for figure in figures.values())
    assert all(bool(figure.isfinite().all()) for figure in figures.values())


@pytest.mark.parametrize("name", MAKE)
def test_order_of_the_batch(name: str) -> None:
    samples, experience, logps = case(2)
    loss, gradient, figures = taken(MAKE[name](), logps[0], samples, experience, logps[2], logps[1])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    new, old, reference = (each[order] for each in logps)
    again = taken(MAKE[name](), new, samples.select(order), experience.select(order), reference, old)
    assert loss.item() == pytest.approx(again[0].item(), abs=1e-6)
    assert torch.allclose(gradient[order], again[1], atol=1e-6)
    for key, figure in figures.items():
        assert torch.allclose(figure[order], again[2][key], atol=1e-6)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("cut", [2, 4])
def test_shares_of_two_processes_add_up(name: str, cut: int) -> None:
    samples, experience, (new, old, reference) = case(3)
    loss, gradient, _ = taken(MAKE[name](), new, samples, experience, reference, old)
    shares, parts = [], []
    for own in (slice(0, cut), slice(cut, 6)):
        index = torch.arange(6)[own]
        cohort = replace(Cohort.of(experience, samples), own=own)
        share, part, _ = taken(
            MAKE[name](),
            new[own],
            samples.select(index),
            experience.select(index),
            reference[own],
            old[own],
            cohort,
        )
        shares.append(share)
        parts.append(part)
    assert float(sum(shares)) == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(torch.cat(parts), gradient, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["d1", "unigrpo group", "summed", "step", "espo", "wd1", "wd1 positive", "dpo"]
)
def test_groups_are_averaged(name: str) -> None:
    """The loss is the mean of the losses of the groups alone; of DPO, of those with a preference."""
    samples, experience, (new, old, reference) = case(4)
    objective = MAKE[name]()
    loss, *_ = taken(objective, new, samples, experience, reference, old)
    whole = UpdateBatch.of(experience, samples, old=old, reference=reference)
    alone = []
    for first in range(0, 6, 2):
        index = torch.arange(first, first + 2)
        one = experience.select(index)
        if name == "dpo" and not objective.learns_from(one).any():
            continue
        alone.append(objective(new[index], whole.select(index)).loss.item())
    assert len(alone) == (2 if name == "dpo" else 3)
    assert loss.item() == pytest.approx(sum(alone) / len(alone), abs=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_a_repeated_draw_changes_nothing(name: str) -> None:
    """Each draw twice: means over draws stay, `sum` counts every draw."""
    samples, experience, (new, old, reference) = case(5)
    loss, *_ = taken(MAKE[name](), new, samples, experience, reference, old)
    twice = MaskedSamples(
        *(torch.cat([part, part], 1) for part in (samples.tokens, samples.scored, samples.weight)),
        samples.region,
    )
    again = [torch.cat([each, each], 1) for each in (new, old, reference)]
    doubled, *_ = taken(MAKE[name](), again[0], twice, experience, again[2], again[1])
    factor = 2 if name in {"summed", "step"} else 1
    assert doubled.item() == pytest.approx(factor * loss.item(), rel=1e-5, abs=1e-6)


# --- GRPO


@pytest.mark.parametrize("average", ["tokens", "draws", "sum"])
@pytest.mark.parametrize("ratio", ["token", "step"])
def test_first_inner_update_is_the_policy_gradient(average: str, ratio: str) -> None:
    """Without an earlier policy the ratio is 1; its gradient is the advantage times that of log p."""
    if (ratio, average) == ("step", "tokens"):
        with pytest.raises(ValueError, match="average=draws or =sum"):
            GRPO(0.2, ratio, average)
        return
    samples, experience, (new, *_) = case(6)
    loss, gradient, figures = taken(GRPO(0.2, ratio, average), new, samples, experience)
    scored, draws = samples.scored.sum((1, 2)), samples.scored.any(-1).sum(-1)
    per_draw = samples.scored.sum(-1)
    expected = torch.zeros_like(gradient)
    for j, m, i in itertools.product(*map(range, gradient.shape)):
        if not samples.scored[j, m, i]:
            continue
        mates = [2 * (j // 2), 2 * (j // 2) + 1]
        size = {
            "tokens": scored[mates].sum(),
            # a step's ratio is one term: the gradient of its log is that of all its tokens
            "draws": draws[mates].sum() * (1 if ratio == "step" else per_draw[j, m]),
            "sum": torch.tensor(2),
        }[average]
        expected[j, m, i] = -experience.advantages[j] / size / 3
    assert torch.allclose(gradient, expected, atol=1e-7)
    # each counted term is the advantage: a draw that scores nothing is none
    terms = scored if (ratio, average) in {("token", "tokens"), ("token", "sum")} else draws
    sizes = torch.full((6,), 2) if average == "sum" else terms.view(3, 2).sum(1).repeat_interleave(2)
    assert loss.item() == pytest.approx(-float((experience.advantages * terms / sizes).sum()) / 3, abs=1e-6)
    learned = experience.advantages != 0
    assert torch.allclose(figures["ratio"][learned], torch.ones(4))
    assert not figures["clip_ratio"].any()
    # old = new: also what an old policy that is the same gives
    same, again, _ = taken(GRPO(0.2, ratio, average), new, samples, experience, old=new)
    assert torch.equal(loss, same)
    assert torch.equal(gradient, again)


def single(advantage: float, m: int = 1, t: int = 1) -> tuple[MaskedSamples, Experience]:
    """Return one sequence with everything scored."""
    ones = torch.ones(1, m, t)
    samples = MaskedSamples(torch.zeros(1, m, t, dtype=torch.long), ones.bool(), ones, ones[:, 0].bool())
    return samples, experience_of(ones[:, 0].bool(), torch.tensor([advantage]))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.1, -2.2, -2.2),  # inside
        (2.0, 1.25, -2.5, -2.5),  # above 1 + epsilon only
        (-2.0, 0.75, 1.6, 0.0),  # below 1 - epsilon, not below 1 - epsilon_high
        (2.0, 1.6, -2.6, 0.0),  # above 1 + epsilon_high: raised enough
        (2.0, 0.5, -1.0, -1.0),  # below, and to be raised: not clipped
        (-2.0, 1.6, 3.2, 3.2),  # above, and to be lowered: not clipped
        (-2.0, 0.5, 1.6, 0.0),  # below 1 - epsilon: lowered enough
    ],
)
@pytest.mark.parametrize("name", ["token", "step", "espo"])
def test_clipping(name: str, advantage: float, ratio: float, loss: float, slope: float) -> None:
    t = 1 if name == "token" else 3
    samples, experience = single(advantage, t=t)
    made = {
        "token": GRPO(0.2, epsilon_high=0.3),
        "step": GRPO(0.2, ratio="step", average="draws", epsilon_high=0.3),
        "espo": ESPO(SUMS, 0.2, 0.3),
    }
    old = torch.full((1, 1, t), -2.0)
    shift = math.log(ratio) * {"token": 1, "step": 1 / t, "espo": 1}[name]
    found, gradient, figures = taken(made[name], old + shift, samples, experience, old=old)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    each = slope / (t if name == "espo" else 1)
    assert torch.allclose(gradient, torch.full((1, 1, t), each), atol=1e-5)
    assert float(figures["ratio"]) == pytest.approx(ratio, rel=1e-5)
    assert float(figures["clip_ratio"]) == (1.0 if slope == 0 else 0.0)


@pytest.mark.parametrize("size", [100.0, -100.0, 5000.0, -5000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", ["token", "step", "espo"])
def test_gradients_are_finite_however_far_the_policy_went(name: str, advantage: float, size: float) -> None:
    samples, experience = single(advantage, t=2)
    made = {"token": GRPO(0.2), "step": GRPO(0.2, ratio="step", average="sum"), "espo": ESPO(SUMS, 0.2)}
    old = torch.full((1, 1, 2), -5001.0)
    loss, gradient, _ = taken(made[name], old + size, samples, experience, old=old)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if advantage * size > 0:
        assert not gradient.any()
    elif size > 0:
        assert bool((gradient > 1e6).all()), "still lowered"


def test_beyond_the_largest_ratio_the_term_goes_on_straight() -> None:
    log_ratio = torch.tensor(
        [LARGEST_LOG_RATIO - 1e-3, LARGEST_LOG_RATIO, LARGEST_LOG_RATIO + 2.0], requires_grad=True
    )
    terms, ratio, active = clip_surrogate(log_ratio, torch.full((3,), -1.0), 0.2, 0.2)
    terms.sum().backward()
    assert not active.any()
    top = math.exp(LARGEST_LOG_RATIO)
    assert terms.tolist() == pytest.approx([-top * math.exp(-1e-3), -top, -3 * top], rel=1e-5)
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([-top * math.exp(-1e-3), -top, -top], rel=1e-5)
    assert ratio[2].item() == pytest.approx(top * math.exp(2), rel=1e-5), "the figure is the ratio itself"


@pytest.mark.parametrize("kl_average", ["same", "sum"])
@pytest.mark.parametrize("average", ["tokens", "draws", "sum"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_the_divergence_token_by_token(kl_estimator: str, average: str, kl_average: str) -> None:
    samples, experience, (new, old, reference) = case(7)
    plain, *_ = taken(GRPO(0.2, average=average), new, samples, experience, old=old)
    for kl_to, other in (("reference", reference), ("old", old)):
        objective = GRPO(0.2, "token", average, "group", 0.5, kl_estimator, kl_to, kl_average)
        assert objective.needs == {"old", kl_to}
        assert bool(objective.learns_from(experience).all())
        loss, _, figures = taken(objective, new, samples, experience, reference, old)
        expected = torch.zeros(3)
        for group in range(3):
            tokens, draws, means = [], [], []
            for j, m in itertools.product((2 * group, 2 * group + 1), range(3)):
                here = samples.scored[j, m]
                d = (other - new)[j, m][here]
                k = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[kl_estimator]
                tokens.extend(k.tolist())
                if len(k):
                    draws.append(float(k.sum()))
                    means.append(float(k.mean()))
            total = {
                "tokens": sum(tokens) / len(tokens),
                "draws": sum(means) / len(means),
                "sum": sum(tokens) / 2,
            }
            expected[group] = total[average] if kl_average == "same" else sum(draws) / len(draws)
        assert (loss - plain).item() == pytest.approx(0.5 * float(expected.mean()), abs=1e-6)
        first = (other - new)[0][samples.scored[0]]
        k = {"k1": -first, "k2": first**2 / 2, "k3": first.exp() - 1 - first}[kl_estimator]
        assert figures["kl"][0].item() == pytest.approx(float(k.mean()), abs=1e-6)
    with pytest.raises(ValueError, match="needs the reference model"):
        GRPO(0.2, kl_coef=0.1)(new, UpdateBatch.of(experience, samples, old=old))
    assert GRPO(0.2, kl_to="old").needs == {"old"}


@pytest.mark.parametrize(
    "make", [lambda: GRPO(0.2), lambda: GRPO(0.2, "step", "sum"), lambda: ESPO(SUMS, 0.2)]
)
def test_one_token_completions_have_the_exact_gradient(make: Callable[[], Objective]) -> None:
    """Summed over all completions, weighted by probability, it is that of minus the expected reward.

    One token, wholly masked: log p is exact. With the rewards themselves as advantages no baseline enters.
    """
    theta = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.double, requires_grad=True)
    rewards = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.double)
    (exact,) = torch.autograd.grad(-(theta.softmax(-1) * rewards).sum(), theta)
    total = torch.zeros_like(theta)
    for token, (reward, p) in enumerate(zip(rewards, theta.softmax(-1).tolist(), strict=True)):
        samples, experience = single(0.0)
        experience = replace(experience, advantages=reward.view(1))
        logps = theta.log_softmax(-1)[token].view(1, 1, 1)
        loss = make()(logps, UpdateBatch.of(experience, samples)).loss
        total += p * torch.autograd.grad(loss, theta)[0]
    assert torch.allclose(total, exact, atol=1e-9)


def test_a_decoding_step_is_an_action() -> None:
    """Two steps of two tokens each: the probability of a completion is the product of its steps'.

    Averages of the summed terms, over all completions, give the exact gradient of the expected reward.
    """
    theta = torch.tensor([[0.3, -1.0], [0.5, 0.2], [-0.4, 0.1]], dtype=torch.double, requires_grad=True)
    logp = theta.log_softmax(-1)
    completions = list(itertools.product(range(2), repeat=3))
    rewards = torch.randn(8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([[True, True, False], [False, False, True]])  # positions 0 and 1, then 2
    expected, total = torch.zeros((), dtype=torch.double), torch.zeros_like(theta)
    for completion, reward in zip(completions, rewards, strict=True):
        chosen = logp[torch.arange(3), list(completion)]
        p = chosen.sum().exp()
        expected = expected - p * reward
        region = torch.ones(1, 3, dtype=torch.bool)
        scored = steps.unsqueeze(0)
        samples = MaskedSamples(torch.zeros(1, 2, 6, dtype=torch.long), scored, scored.double(), region)
        experience = replace(experience_of(region, torch.zeros(1)), advantages=reward.view(1))
        result = GRPO(0.2, "step", "sum")(chosen * scored, UpdateBatch.of(experience, samples))
        assert float(result.figures["ratio"]) == 1.0
        total += p.item() * torch.autograd.grad(result.loss, theta, retain_graph=True)[0]
    (exact,) = torch.autograd.grad(expected, theta)
    assert torch.allclose(total, exact, atol=1e-9)


# --- ESPO


def test_espo_takes_the_ratio_of_bounds_a_position() -> None:
    samples, experience, (new, old, reference) = case(8)
    loss, _, figures = taken(ESPO(SUMS, 0.9, kl_coef=0.5), new, samples, experience, reference, old)
    bound, before, base = (SUMS(each, samples).sum(-1) for each in (new, old, reference))
    n = samples.region.sum(-1)
    ratio = ((bound - before) / n).exp()
    assert float((ratio - 1).abs().max()) < 0.9
    kl = (bound - base) ** 2 / 2 / n
    assert torch.allclose(figures["ratio"], ratio)
    assert torch.allclose(figures["kl"], kl)
    assert loss.item() == pytest.approx(float((-ratio * experience.advantages + 0.5 * kl).mean()), rel=1e-5)
    assert ESPO(SUMS, 0.2).needs == {"old"}
    with pytest.raises(ValueError, match="needs the reference model"):
        ESPO(SUMS, 0.2, kl_coef=0.1)(new, UpdateBatch.of(experience, samples, old=old))


@pytest.mark.parametrize("make", [lambda e: ESPO(e, 0.2), WD1, lambda e: DPO(e, 0.1)])
def test_bounds_must_be_sums(make: Callable[[EUBO | ELBO], Objective]) -> None:
    make(EUBO(1.5, "elbo_weight"))
    with pytest.raises(ValueError, match=r"normalization=per_token; set algorithm.normalization=elbo_weight"):
        make(ELBO())


# --- WD1


def test_wd1_weights() -> None:
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.5, 0.5, 0.0])
    group = torch.tensor([7, 7, 3, 3, 3, 9])
    raised, lowered = WD1(SUMS).weights(advantages, group)
    high = math.exp(1) / (math.exp(1) + math.exp(-1))
    expected = torch.tensor([high, 1 - high, 1 / 3, 1 / 3, 1 / 3, 1.0]) / 3
    assert torch.allclose(raised, expected)
    assert torch.equal(raised[2:], lowered[2:]), "equal rewards teach nothing"
    assert torch.allclose(lowered[:2], raised[:2].flip(0))
    raised, lowered = WD1(SUMS, loss_norm="batch").weights(advantages, group)
    assert torch.allclose(raised, advantages.softmax(0))
    assert torch.allclose(lowered, (-advantages).softmax(0))
    for objective in (WD1(SUMS), WD1(SUMS, loss_norm="batch")):
        assert all(float(w.sum()) == pytest.approx(1.0) for w in objective.weights(advantages, group))


def test_wd1_learns_from_groups_with_a_spread() -> None:
    samples, experience, (new, *_) = case(9)
    assert WD1(SUMS).learns_from(experience).tolist() == [True, True, False, False, True, True]
    assert WD1(SUMS).needs == frozenset()
    loss, gradient, _ = taken(WD1(SUMS), new, samples, experience)
    assert not gradient[2:4].any()
    _, positive, _ = taken(WD1(SUMS, positive_only=True), new, samples, experience)
    assert torch.allclose(positive[2:4], -samples.weight[2:4] / 3 / 2 / 3)
    bound = SUMS(new, samples).sum(-1)
    by_hand = 0.0
    for first in (0, 4):
        a = experience.advantages[first : first + 2]
        by_hand -= float(((a.softmax(0) - (-a).softmax(0)) * bound[first : first + 2]).sum()) / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


# --- DPO


def test_dpo_by_hand() -> None:
    """One pair, one draw: the second completion is preferred."""
    scored = torch.tensor([[[True, False]], [[True, True]]])
    region = torch.tensor([[True, True], [True, True]])
    weight = torch.tensor([[[2.0, 0.0]], [[1.0, 1.0]]])
    samples = MaskedSamples(torch.zeros(2, 1, 4, dtype=torch.long), scored, weight, region)
    experience = experience_of(region, torch.tensor([-0.5, 0.5]))
    new = torch.tensor([[[-1.0, 0.0]], [[-0.5, -0.25]]])
    reference = torch.tensor([[[-0.75, 0.0]], [[-1.0, -0.5]]])
    # gains: 2 (-1 + 0.75) = -0.5 of the rejected, -0.75 + 1.5 = 0.75 of the chosen
    margin = 0.1 * (0.75 + 0.5)
    loss, gradient, figures = taken(DPO(SUMS, 0.1, 0.3), new, samples, experience, reference)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)) + 0.3 * 0.75 / 2, rel=1e-6)
    slope = 0.1 / (1 + math.exp(margin))  # beta times sigmoid(-margin)
    expected = slope * torch.tensor([[[2.0, 0.0]], [[-1.0, -1.0]]])
    expected[1] -= 0.3 / 2
    assert torch.allclose(gradient, expected, atol=1e-7)
    assert torch.allclose(figures["dpo/margin"], torch.full((2,), margin))
    assert figures["dpo/accuracy"].tolist() == [1.0, 1.0]
    assert figures["bound/lower"].tolist() == pytest.approx([-2.0, -0.75])
    swapped = replace(experience, advantages=-experience.advantages)
    _, _, figures = taken(DPO(SUMS, 0.1), new, samples, swapped, reference)
    assert torch.allclose(figures["dpo/margin"], torch.full((2,), -margin))
    assert not figures["dpo/accuracy"].any()


def test_dpo_starts_at_log_two_and_ties_teach_nothing() -> None:
    samples, experience, (new, _, reference) = case(10)
    objective = DPO(SUMS, 0.2)
    assert objective.needs == {"reference"}
    assert objective.learns_from(experience).tolist() == [True, True, False, False, True, True]
    loss, gradient, _ = taken(objective, reference, samples, experience, reference)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6), "the mean over preferences, not over pairs"
    assert torch.allclose(
        gradient,
        samples.weight / 3 * 0.1 / 2 * -experience.advantages.sign()[:, None, None],
        atol=1e-7,
    )
    tied = replace(experience, advantages=torch.zeros(6))
    loss, gradient, _ = taken(objective, new, samples, tied, reference)
    assert loss.item() == 0.0
    assert not gradient.any()


def test_dpo_far_from_the_reference() -> None:
    samples, experience, (new, *_) = case(11)
    for size in (1e4, -1e4):
        loss, gradient, _ = taken(DPO(SUMS, 1.0), new, samples, experience, new + size * samples.scored)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_dpo_compares_two() -> None:
    samples, experience, (new, _, reference) = case(12, groups=2, size=3)
    with pytest.raises(ValueError, match=r"groups hold \[3\]; set group_size=2"):
        DPO(SUMS, 0.1).learns_from(experience)
    with pytest.raises(ValueError, match="group_size=2"):
        DPO(SUMS, 0.1)(new, UpdateBatch.of(experience, samples, reference=reference))
    samples, experience, (new, *_) = case(12)
    with pytest.raises(ValueError, match="needs the reference model"):
        DPO(SUMS, 0.1)(new, UpdateBatch.of(experience, samples))


# --- parameters


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GRPO(1.0), "epsilon=1.0 is out of range; allowed: a number from 0 to below 1"),
        (lambda: GRPO(0.2, epsilon_high=-0.1), "epsilon_high=-0.1"),
        (
            lambda: GRPO(0.2, ratio="sequence"),
            "ratio='sequence' is out of range; allowed: one of: token, step",
        ),
        (lambda: GRPO(0.2, average="mean"), "average='mean'"),
        (lambda: GRPO(0.2, loss_norm="token"), "loss_norm='token'"),
        (lambda: GRPO(0.2, kl_coef=-1), "kl_coef=-1"),
        (lambda: GRPO(0.2, kl_estimator="k4"), "kl_estimator='k4'"),
        (lambda: GRPO(0.2, kl_to="new"), "kl_to='new'"),
        (lambda: GRPO(0.2, kl_average="mean"), "kl_average='mean'"),
        (lambda: ESPO(SUMS, -0.1), "epsilon=-0.1"),
        (lambda: ESPO(SUMS, 0.2, loss_norm="none"), "loss_norm='none'"),
        (lambda: WD1(SUMS, positive_only=1), "positive_only=1"),
        (lambda: WD1(SUMS, loss_norm="none"), "loss_norm='none'"),
        (lambda: DPO(SUMS, 0.0), "dpo_beta=0.0"),
        (lambda: DPO(SUMS, 0.1, -1.0), "sft_coef=-1.0"),
    ],
)
def test_parameters_out_of_range(make: Callable[[], Objective], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make()
