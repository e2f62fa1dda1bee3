"""Losses and gradients against the authors' code, case by case."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from spg.estimators import ELBO, EUBO, LikelihoodEstimator, Mixture, Sandwich, Zero
from spg.objectives.spg import SPG
from spg.types import Experience, MaskedSamples
from tests.helpers import GOLDEN, experience_of, golden

CASES = sorted(path.name for path in (GOLDEN / "spg_loss").glob("*.npz"))
# in these the reference drops tokens whose p**beta is 0 in float32, or has NaN gradients; or is bf16
DEFECTIVE = {"edge_underflow_beta0.5.npz", "edge_underflow_beta1.5.npz", "edge_underflow_mix.npz"}
BF16 = {"edge_bf16_logits.npz"}


def estimator_of(args: dict[str, Any]) -> LikelihoodEstimator:
    beta, omega = args["eubo_beta"], args["mix_weight"]
    made = {"elbo": ELBO(), "eubo": EUBO(beta), "mix": Mixture(beta, omega), "zero": Zero()}
    return made[args["logp_estimation"]]


def case_of(name: str) -> tuple[dict[str, Tensor], dict[str, Any], MaskedSamples, Experience]:
    z, args = golden(f"spg_loss/{name}")
    completion = z["completion_mask"].bool()
    masked = z["perturbed"][:, :, -completion.shape[1] :] == args["mask_id"]
    scored = masked & completion.unsqueeze(1)
    weight = scored * completion.sum(-1)[:, None, None] / scored.sum(-1, keepdim=True).clamp_min(1)
    samples = MaskedSamples(z["perturbed"], scored, weight, completion)
    return z, args, samples, experience_of(completion, z["advantages"])


def token_logps(z: dict[str, Tensor], args: dict[str, Any], logits: Tensor) -> Tensor:
    """Return log-probabilities [b T c] of the completion's tokens, from the stored logits."""
    b, t, _ = z["perturbed"].shape
    c = z["completion_ids"].shape[1]
    if args["cfg_scale"]:
        with_prompt, without = logits.chunk(2)
        logits = (without + (args["cfg_scale"] + 1) * (with_prompt - without)).view(b, t, *logits.shape[1:])
    logps = logits.log_softmax(-1)[:, :, -c:]
    targets = z["completion_ids"][:, None, :, None].expand(b, t, c, 1)
    return logps.gather(-1, targets).squeeze(-1)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DEFECTIVE | BF16])
def test_loss_and_gradient(name: str) -> None:
    z, args, samples, experience = case_of(name)
    logits = z["logits"].requires_grad_()
    loss, _ = SPG(Sandwich(ELBO(), estimator_of(args)))(token_logps(z, args, logits), samples, experience)
    loss.backward()
    assert logits.grad is not None
    assert float(loss) == pytest.approx(float(z["loss"]), rel=1e-5, abs=1e-6)
    size = float(z["grad_logits"].abs().max())
    assert float((logits.grad - z["grad_logits"]).abs().max()) <= max(1e-5 * size, 1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DEFECTIVE | BF16])
def test_sequence_figures(name: str) -> None:
    z, args, samples, experience = case_of(name)
    bounds = Sandwich(ELBO(), estimator_of(args))(token_logps(z, args, z["logits"]), samples)
    lower, upper = bounds.lower.sum(-1), bounds.upper.sum(-1)
    assert torch.allclose(lower, z["per_seq_logps_if_positive"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(upper, z["per_seq_logps_if_negative"], rtol=1e-5, atol=1e-6)
    chosen = torch.where(experience.advantages > 0, lower, upper)
    assert torch.allclose(chosen, z["per_seq_logps"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(DEFECTIVE))
def test_where_the_reference_underflows_ours_is_the_float64_value(name: str) -> None:
    """The reference takes p**beta in float32: 0 drops the token from the mean, denormals give NaN."""
    z, args, samples, experience = case_of(name)
    objective = SPG(Sandwich(ELBO(), estimator_of(args)))
    values, gradients = [], []
    for dtype in (torch.float, torch.double):
        logits = z["logits"].detach().to(dtype).requires_grad_()
        loss, _ = objective(token_logps(z, args, logits), samples, experience)
        loss.backward()
        assert logits.grad is not None
        values.append(float(loss))
        gradients.append(logits.grad.double())
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
    assert torch.isfinite(gradients[0]).all()
    reference_is_off = abs(float(z["loss"]) - values[1]) > 0.1 * abs(values[1])
    assert reference_is_off or not torch.isfinite(z["grad_logits"]).all()


def test_bf16_reference_within_its_precision() -> None:
    z, args, samples, experience = case_of("edge_bf16_logits.npz")
    loss, _ = SPG(Sandwich(ELBO(), estimator_of(args)))(token_logps(z, args, z["logits"]), samples, experience)
    assert float(loss) == pytest.approx(float(z["loss"]), rel=1e-2)


def test_one_token_at_any_logit_gap() -> None:
    """The EUBO of one token is log p for every beta; its gradient stays 1 - p and p."""
    scan = json.loads((GOLDEN / "spg_loss" / "underflow_scan.json").read_text())
    one = torch.ones(1, 1, 1)
    samples = MaskedSamples(torch.zeros(1, 1, 1, dtype=torch.long), one.bool(), one, one[0].bool())
    for row in scan:
        logits = torch.tensor([float(row["logit_gap"]), 0.0], requires_grad=True)
        value = EUBO(row["beta"])(logits.log_softmax(-1)[0].view(1, 1, 1), samples).sum()
        value.backward()
        assert logits.grad is not None
        assert float(value) == pytest.approx(row["logit_gap"], rel=1e-6)
        assert logits.grad.tolist() == pytest.approx([1.0, -1.0], abs=1e-6)
    assert any(abs(r["value"] - r["logit_gap"]) > 1 or r["grad"][0] != pytest.approx(1.0) for r in scan)
