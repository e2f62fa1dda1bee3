"""What several objectives are made of: shares of the loss, clipped ratios, KL estimates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spg.core.types import Cohort, MaskedSamples, UpdateBatch

LossNorm = Literal["group", "batch"]
KLEstimator = Literal["k1", "k2", "k3"]

# nats; above it, the ratio of an action that is not clipped grows linearly, not exponentially
LARGEST_LOG_RATIO = 20.0


def normalize(parts: Tensor, sizes: Tensor, group: Tensor, loss_norm: str) -> Tensor:
    """Divide parts of the loss by the sizes of what they are averaged over.

    Args:
        parts: [N], one per sequence of the update.
        sizes: [N], what each sequence counts.
        group: [N], numbers of the sequences' prompts.
        loss_norm: `group` divides by the sum over the sequence's own group and by the number of groups,
            `batch` by the sum over all sequences.

    Returns:
        Normalised parts [N].
    """
    if loss_norm == "batch":
        return parts / sizes.sum().clamp_min(1)
    together = same_group(group)  # [N N]: to number the groups would wait for the device
    return parts / (together * sizes).sum(1).clamp_min(1) / count_groups(together)


def same_group(group: Tensor) -> Tensor:
    """Return bool [N N]: whether two sequences belong to one group, by their group numbers [N]."""
    return group.unsqueeze(1) == group


def count_groups(together: Tensor) -> Tensor:
    """Return the number of groups [], from whether two sequences belong to one group, bool [N N]."""
    return (~together.tril(-1).any(1)).sum()


def normalize_own(parts: Tensor, sizes: Tensor, cohort: Cohort, loss_norm: str) -> Tensor:
    """Return `normalize` of this process's `parts` [B], from the `sizes` [N] of the whole cohort."""
    weights = normalize(torch.ones_like(sizes, dtype=torch.float), sizes.float(), cohort.group, loss_norm)
    return parts * weights[cohort.own]


def clip_surrogate(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clipped surrogate of PPO (arXiv 1707.06347, Eq. 7) for ratios r = exp(log_ratio).

    If clipping is active the gradient is exactly 0, however large the ratio is.

    Args:
        log_ratio: [B ...], in nats.
        advantages: [B].
        low: The ratio is clipped below 1 - low.
        high: The ratio is clipped above 1 + high.

    Returns:
        min(r A, clip(r, 1 - low, 1 + high) A), r, and whether clipping is active; each [B ...].
    """
    advantages = advantages.view(-1, *[1] * (log_ratio.dim() - 1)).expand_as(log_ratio)
    detached = log_ratio.detach().exp()
    above, below = detached > 1 + high, detached < 1 - low
    active = (above & (advantages > 0)) | (below & (advantages < 0))
    # a ratio that overflows would make gradients infinite, and NaN if they should be 0
    bounded = log_ratio.clamp(max=LARGEST_LOG_RATIO)
    ratio = bounded.exp() * (1 + (log_ratio - bounded))
    limit = torch.where(above, 1 + high, 1 - low)
    return torch.where(active, limit, ratio) * advantages, detached, active


def kl_estimates(log_ratio: Tensor, estimator: str) -> Tensor:
    """Estimate the KL divergence of the policy to another model, under the policy's own samples.

    With d the log-probability of the other model less that of the policy, `k1` is -d, `k2` d^2 / 2
    and `k3` exp(d) - d - 1 (Schulman 2020). The last two are never negative, and 0 if the models agree.

    Args:
        log_ratio: The differences d [...], in nats.
        estimator: One of k1, k2 and k3.

    Returns:
        Estimates [...], in nats.
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.exp() - log_ratio - 1


def divergence(
    token_logps: Tensor, reference: Tensor, samples: MaskedSamples, estimator: str = "k3"
) -> Tensor:
    """Return the KL divergence to the reference, [B] nats per scored token, from log-probs [B M T]."""
    log_ratio = (reference - token_logps).masked_fill(~samples.scored, 0.0)
    excess = kl_estimates(log_ratio, estimator).sum((1, 2))
    return excess / samples.scored.sum((1, 2)).clamp_min(1)


def require_reference(batch: UpdateBatch, user: str) -> Tensor:
    """Return the reference model's log-probabilities [B M T].

    Raises:
        ValueError: if the batch lacks them; the message names `user`, which needs them.
    """
    if batch.reference is None:
        raise ValueError(
            f"{user} needs the reference model's log-probabilities; give them as UpdateBatch.reference"
        )
    return batch.reference
