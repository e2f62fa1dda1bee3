"""Losses and gradients of the other methods against their authors' code, case by case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spg.algorithms.estimators import ELBO
from spg.algorithms.objectives.espo import ESPO
from spg.algorithms.objectives.grpo import GRPO
from spg.algorithms.objectives.wd1 import WD1
from spg.core.types import Experience, MaskedSamples, UpdateBatch
from tests.helpers import GOLDEN, experience_of, golden

NAMES = sorted(path.stem for path in (GOLDEN / "baselines").glob("*.npz"))
MASK = 12


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return golden(f"baselines/{name}.npz")


def logps_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities [... c] of the completion `ids` [... c] from logits [... L V]."""
    completion = logits[..., -ids.shape[-1] :, :].log_softmax(-1)
    return completion.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def masked(tokens: Tensor, scored: Tensor, weight: Tensor, region: Tensor) -> MaskedSamples:
    return MaskedSamples(tokens, scored, weight.float(), region)


def one_draw(z: dict[str, Tensor]) -> tuple[MaskedSamples, Experience, Tensor, Tensor]:
    """Return a case with a fully masked completion: samples, experience, logits [b 1 L V], log-probs."""
    region = z["completion_mask"].bool()
    samples = masked(z["perturbed"].unsqueeze(1), region.unsqueeze(1), region.unsqueeze(1), region)
    logits = z["logits"].unsqueeze(1).requires_grad_()
    logps = logps_of(logits, z["completion_ids"].unsqueeze(1))
    return samples, experience_of(region, z["advantages"]), logits, logps * samples.scored


def check(
    loss: Tensor,
    logits: Tensor,
    z: dict[str, Tensor],
    back: Any = lambda gradient: gradient.squeeze(1),
    absolute: float = 1e-6,
) -> None:
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(z["loss"].item(), rel=1e-5, abs=absolute)
    difference = (back(logits.grad) - z["grad_logits"]).abs().max()
    assert float(difference) <= 1e-4 * float(z["grad_logits"].abs().max())


def test_every_case_is_used() -> None:
    prefixes = ("d1_", "wd1_", "espo_", "unigrpo_", "dllmrl_coupled")
    assert len(NAMES) == 15
    assert all(name.startswith(prefixes) for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("d1_")])
def test_d1(name: str) -> None:
    """With `num_iterations` 1 there is no earlier policy.

    The released figure `clip_ratio` counts tokens whose ratio is out of range but for which min takes the
    unclipped term; ours counts those where it takes the clipped one, so that no gradient is left.
    """
    z, args = load(name)
    samples, experience, logits, logps = one_draw(z)
    assert torch.allclose(logps.squeeze(1), z["per_token_logps"] * samples.region, atol=1e-5)
    objective = GRPO(args["epsilon"], kl_coef=args["beta"])
    assert objective.needs == ({"old", "reference"} if args["beta"] else {"old"})
    reference = z["ref_per_token_logps"].unsqueeze(1) * samples.scored
    old = z["old_per_token_logps"].unsqueeze(1) * samples.scored if args["num_iterations"] > 1 else None
    result = objective(logps, UpdateBatch.of(experience, samples, old=old, reference=reference))
    figures = result.figures
    check(result.loss, logits, z)
    counts = samples.scored.sum((1, 2))
    metrics = {key: values[0] for key, values in args["metrics"].items()}
    mean = {key: float((figure * counts).sum() / counts.sum()) for key, figure in figures.items()}
    before = logps.detach() if old is None else old
    ratio = (logps.detach() - before).exp()[samples.scored]
    outside = ((ratio - 1).abs() > args["epsilon"]).float().mean()
    assert mean["clip_ratio"] == pytest.approx(float(outside) - metrics["clip_ratio"], abs=1e-6)
    assert mean["ratio"] == pytest.approx(float(ratio.mean()), rel=1e-5)
    if args["beta"]:
        assert mean["kl"] == pytest.approx(metrics["kl"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("wd1_")])
def test_wd1(name: str) -> None:
    z, _ = load(name)
    samples, experience, logits, logps = one_draw(z)
    objective = WD1(ELBO("elbo_weight"), positive_only="psr_only" in name)
    raised, lowered = objective.weights(experience.advantages, experience.rollout.group)
    assert torch.allclose(raised, z["w_plus"], rtol=1e-5)
    assert torch.allclose(lowered, z["w_minus"], rtol=1e-5)
    loss = objective(logps, UpdateBatch.of(experience, samples)).loss
    # two sums of about 20 nats each, which nearly cancel in one case
    check(loss, logits, z, absolute=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("espo_")])
def test_espo(name: str) -> None:
    """Draws and complements, each weighted (c + 1) / (tokens it masks); after an EOS, too."""
    z, args = load(name)
    tokens = z["perturbed"].transpose(0, 1)
    c = z["completion_ids"].shape[-1]
    scored = tokens[..., -c:] == MASK
    weight = scored * (c + 1) / scored.sum(-1, keepdim=True).clamp_min(1)
    region = torch.ones_like(scored[:, 0])
    samples = masked(tokens, scored, weight, region)
    experience = experience_of(region, z["advantages"])
    logits = z["logits"].transpose(0, 1).contiguous().requires_grad_()
    logps = logps_of(logits, z["completion_ids"].unsqueeze(1).expand_as(scored)) * scored
    objective = ESPO(ELBO("elbo_weight"), args["epsilon_low"], args["epsilon_high"], args["beta"])
    assert torch.allclose(objective.estimator(logps, samples).sum(-1), z["elbo"], rtol=1e-5)
    # the goldens hold ELBOs of the other two models, not their log-probabilities: any with that ELBO
    old = spread(z["old_elbo"], samples) if args["num_iterations"] > 1 else None
    reference = spread(z["ref_elbo"], samples)
    result = objective(logps, UpdateBatch.of(experience, samples, old=old, reference=reference))
    figures = result.figures
    check(result.loss, logits, z, lambda gradient: gradient.transpose(0, 1))
    metrics = args["metrics"]
    assert float(figures["clip_ratio"].mean()) == pytest.approx(metrics["clip_ratio/region_mean"][0])
    if args["beta"]:
        assert float(figures["kl"].mean()) == pytest.approx(metrics["kl"][0], rel=1e-5)


def spread(elbo: Tensor, samples: MaskedSamples) -> Tensor:
    """Return log-probabilities [b M c] whose ELBO is `elbo` [b]."""
    unit = ELBO("elbo_weight")(samples.scored.float(), samples).sum(-1)
    return samples.scored * (elbo / unit)[:, None, None]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("unigrpo_", "dllmrl_"))])
@pytest.mark.parametrize("joined", [False, True])
def test_dllm_rl(name: str, joined: bool) -> None:
    """Masked copies as sequences of their own, and as draws of the sequences that they belong to."""
    z, args = load(name)
    c = args["max_gen_length"]
    scored, ids = z["p_mask"][:, -c:], z["labels"][:, -c:].clamp_min(0)
    logits = z["logits"].clone().requires_grad_()
    logps, old = logps_of(logits, ids) * scored, z["old_logp"][:, -c:] * scored
    advantages = z["advantages_rows"]
    # a sequence's copies stand together and share its advantage, which no other sequence has
    owner = (advantages.diff(prepend=advantages[:1]) != 0).cumsum(0) if joined else torch.arange(len(scored))
    draw = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
    shape = (int(owner.max()) + 1, int(draw.max()) + 1, c)

    def placed(rows: Tensor) -> Tensor:
        return rows.new_zeros(shape).index_put((owner, draw), rows)

    seen = placed(scored)
    samples = masked(placed(z["perturbed"][:, -c:]), seen, seen, seen.any(1))
    first = torch.searchsorted(owner, torch.arange(shape[0]))
    experience = experience_of(samples.region, advantages[first])
    objective = GRPO(
        args["eps"],
        average="draws",
        loss_norm="batch",
        kl_coef=args["beta"],
        kl_estimator="k3" if args["use_kl_estimator_k3"] else "k1",
        kl_to="old",
        kl_average="sum",
    )
    assert objective.needs == {"old"}
    batch = UpdateBatch.of(experience, samples, old=placed(old))
    loss = objective(placed(logps), batch).loss
    check(loss, logits, z, lambda gradient: gradient)
    if not joined:
        return
    # a case is one group, hence both norms the same
    objective.loss_norm = "group"
    grouped = objective(placed(logps), batch).loss
    assert grouped.item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_kl_of_the_released_code_is_the_first_estimator() -> None:
    """The case with a KL divergence says `k1`: with the sign turned, or another estimator, it fails."""
    z, args = load("unigrpo_random_masking_k1_beta0.01")
    assert not args["use_kl_estimator_k3"]
    c = args["max_gen_length"]
    scored = z["p_mask"][:, -c:]
    logps = logps_of(z["logits"], z["labels"][:, -c:].clamp_min(0)) * scored
    samples = masked(z["perturbed"].unsqueeze(1), scored.unsqueeze(1), scored.unsqueeze(1), scored)
    experience = experience_of(scored, z["advantages_rows"])
    found = {}
    for kl_estimator in ("k1", "k2", "k3"):
        objective = GRPO(0.2, "token", "draws", "batch", 0.01, kl_estimator, "old", "sum")
        old = (z["old_logp"][:, -c:] * scored).unsqueeze(1)
        batch = UpdateBatch.of(experience, samples, old=old)
        found[kl_estimator] = objective(logps.unsqueeze(1), batch).loss.item()
    close = [key for key, value in found.items() if value == pytest.approx(z["loss"].item(), rel=1e-5)]
    assert close == ["k1"]


def test_a_changed_setting_is_seen() -> None:
    """The tolerance tells the cases from near misses: another epsilon, average or weight."""
    z, args = load("d1_beta0.0_mu3_step0")
    samples, experience, _, logps = one_draw(z)
    old = z["old_per_token_logps"].unsqueeze(1) * samples.scored
    for objective in (GRPO(args["epsilon"] - 0.01), GRPO(args["epsilon"], average="draws")):
        loss = objective(logps, UpdateBatch.of(experience, samples, old=old)).loss
        assert loss.item() != pytest.approx(z["loss"].item(), rel=1e-3)
    z, args = load("espo_beta0_mc1")
    tokens = z["perturbed"].transpose(0, 1)
    scored = tokens[..., -12:] == MASK
    weight = scored * 12 / scored.sum(-1, keepdim=True).clamp_min(1)
    samples = masked(tokens, scored, weight, torch.ones_like(scored[:, 0]))
    logps = logps_of(z["logits"].transpose(0, 1), z["completion_ids"].unsqueeze(1).expand_as(scored)) * scored
    elbo = ELBO("elbo_weight")(logps, samples).sum(-1)
    assert torch.allclose(elbo * 13 / 12, z["elbo"], rtol=1e-5), "the factor c + 1, not c"
