"""What several objectives are made of: shares of the loss, clipped ratios, KL estimates."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.core.types import Cohort, MaskedSamples

LARGEST = 20.0  # nats; a larger log-ratio of an action whose ratio is not clipped raises the loss linearly


def shares(parts: Tensor, sizes: Tensor, group: Tensor, loss_norm: str) -> Tensor:
    """Return `parts` [N] divided by what normalises them: sums [N] of `sizes` [N].

    `group`: by the sum over the sequence's own group [N] and the number of groups; `batch`: by the sum
    over all sequences.
    """
    if loss_norm == "batch":
        return parts / sizes.sum().clamp_min(1)
    _, index = torch.unique(group, return_inverse=True)
    num_groups = int(index.max()) + 1
    totals = sizes.new_zeros(num_groups).index_add(0, index, sizes).clamp_min(1)
    return parts / totals[index] / num_groups


def own_shares(parts: Tensor, sizes: Tensor, cohort: Cohort, loss_norm: str) -> Tensor:
    """Return `parts` [B] of this process's sequences, normalised by `sizes` [N] of all of the cohort's."""
    weights = shares(torch.ones_like(sizes, dtype=torch.float), sizes.float(), cohort.group, loss_norm)
    return parts * weights[cohort.own]


def clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (min(r A, clip(r, 1 - low, 1 + high) A), r, where clipping is active) of log r; all [B ...].

    advantages [B]. Where clipping is active the gradient is exactly 0, however large the ratio is.
    """
    advantages = advantages.view(-1, *[1] * (log_ratio.dim() - 1)).expand_as(log_ratio)
    detached = log_ratio.detach().exp()
    above, below = detached > 1 + high, detached < 1 - low
    active = (above & (advantages > 0)) | (below & (advantages < 0))
    # a ratio that overflows would make gradients infinite, and NaN where they should be 0
    bounded = log_ratio.clamp(max=LARGEST)
    ratio = bounded.exp() * (1 + (log_ratio - bounded))
    limit = torch.where(above, 1 + high, 1 - low)
    return torch.where(active, limit, ratio) * advantages, detached, active


def kl_estimates(log_ratio: Tensor, estimator: str) -> Tensor:
    """Return estimates [...], in nats, of the KL divergence of the policy to another, under its own samples.

    log_ratio [...]: log-probability of the other model less that of the policy, d. `k1` is -d, `k2` d^2 / 2
    and `k3` exp(d) - d - 1; the last two are never negative and 0 where the models agree.
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.exp() - log_ratio - 1


def divergence(
    token_logps: Tensor, reference: Tensor, samples: MaskedSamples, estimator: str = "k3"
) -> Tensor:
    """Return the KL divergence to the reference, [B] nats a scored token, from log-probs [B M T]."""
    log_ratio = (reference - token_logps).masked_fill(~samples.scored, 0.0)
    excess = kl_estimates(log_ratio, estimator).sum((1, 2))
    return excess / samples.scored.sum((1, 2)).clamp_min(1)


def required(logps: Tensor | None, model: str, reason: str) -> Tensor:
    """Return `logps` [B M T]; raises ValueError, naming `model` and who needs it, where they are None."""
    if logps is None:
        raise ValueError(f"{reason} needs the {model} model's log-probabilities")
    return logps
