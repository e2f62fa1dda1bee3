"""GRPO for masked diffusion: clipped ratios under the masks of the update.

One loss, of which diffu-GRPO (D1, arXiv 2504.12216), coupled-GRPO (arXiv 2506.20639), UniGRPO (arXiv
2505.15809) and step-wise policy gradients are settings. They differ mostly in their masks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spg.algorithms.objectives.base import ObjectiveResult
from spg.algorithms.objectives.terms import (
    KLEstimator,
    LossNorm,
    clip_surrogate,
    divergence,
    kl_estimates,
    normalize_own,
    require_reference,
)
from spg.core.rules import NotNegative, Share, checked
from spg.core.types import Cohort, Experience, UpdateBatch


class GRPO:
    """Minus the clipped surrogate min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), plus a KL divergence.

    The ratio r is of the policy to the one that made the rollout, under the same masks.

    Args:
        epsilon: How far below 1 the ratio may go.
        ratio: `token`: one ratio for each scored token of each draw; `step`: one for each draw, the product
            of its scored tokens' ratios (if draws are decoding steps: the probability of what the step
            committed), so that a draw has one term.
        average: `tokens`: every scored token counts the same; `draws`: the mean over each draw's scored
            tokens, then over the draws that score any; `sum`: the sum over a sequence, then the mean over
            sequences.
        loss_norm: `group`: the average is taken over each prompt's group, then over groups; `batch`: over the
            whole update.
        kl_coef: Coefficient of the KL divergence per scored token.
        kl_estimator: How the divergence is estimated, see `kl_estimates`.
        kl_to: The divergence is to the model before training (`reference`) or to the policy that made the
            rollout (`old`).
        kl_average: `same`: averaged over tokens and draws as above; `sum`: summed over a draw's tokens and
            averaged over draws.
        epsilon_high: How far above 1 the ratio may go; None for epsilon.

    Raises:
        ValueError: for ratio=step with average=tokens.
    """

    # a fact for the update, see `coupling`
    couples = "sequence"

    @checked
    def __init__(
        self,
        epsilon: Share,
        ratio: Literal["token", "step"] = "token",
        average: Literal["tokens", "draws", "sum"] = "tokens",
        loss_norm: LossNorm = "group",
        kl_coef: NotNegative = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_to: Literal["reference", "old"] = "reference",
        kl_average: Literal["same", "sum"] = "same",
        epsilon_high: NotNegative | None = None,
    ) -> None:
        if ratio == "step" and average == "tokens":
            raise ValueError(
                "ratio=step has one term a draw, which average=tokens would have to count once a token; "
                "set algorithm.objective.average=draws or =sum"
            )
        self.epsilon = epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high
        self.ratio = ratio
        self.average = average
        self.loss_norm = loss_norm
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator
        self.kl_to = kl_to
        self.kl_average = kl_average
        self.needs = frozenset({"old", "reference"} if kl_coef > 0 and kl_to == "reference" else {"old"})

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences whose advantage is not 0; all, if the loss has a KL divergence."""
        return (experience.advantages != 0) | (self.kl_coef > 0)

    def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
        """Compute the loss from log-probabilities [B M T].

        Raises:
            ValueError: if kl_coef > 0 with kl_to=reference and the batch has no reference.
        """
        samples, cohort = batch.samples, batch.cohort
        old = token_logps.detach() if batch.old is None else batch.old
        log_ratio = (token_logps - old).masked_fill(~samples.scored, 0.0)
        counted = samples.scored
        if self.ratio == "step":
            log_ratio, counted = log_ratio.sum(-1, keepdim=True), counted.any(-1, keepdim=True)
        terms, ratio, active = clip_surrogate(
            log_ratio, batch.experience.advantages, self.epsilon, self.epsilon_high
        )
        loss = -self._averaged(terms, counted, cohort, self.average).sum()
        number = counted.sum((1, 2)).clamp_min(1)
        figures = {
            "ratio": (ratio * counted).sum((1, 2)) / number,
            "clip_ratio": (active & counted).sum((1, 2)) / number,
        }
        if self.kl_coef > 0:
            other = old
            if self.kl_to == "reference":
                other = require_reference(batch, f"kl_coef={self.kl_coef} with kl_to=reference")
            figures["kl"] = divergence(token_logps, other, samples, self.kl_estimator)
            excess = kl_estimates((other - token_logps).masked_fill(~samples.scored, 0.0), self.kl_estimator)
            average = self.average if self.kl_average == "same" else "summed draws"
            loss = loss + self.kl_coef * self._averaged(excess, samples.scored, cohort, average).sum()
        return ObjectiveResult(loss, figures)

    def _averaged(self, terms: Tensor, counted: Tensor, cohort: Cohort, average: str) -> Tensor:
        """Return each sequence's share [B] of the average of terms [B M K] where `counted` [B M K]."""
        draws = torch.where(counted, terms, 0.0).sum(-1)
        if average == "draws":
            draws = draws / counted.sum(-1).clamp_min(1)
        sizes = {"tokens": cohort.scored, "sum": torch.ones_like(cohort.scored)}.get(average, cohort.draws)
        return normalize_own(draws.sum(-1), sizes, cohort, self.loss_norm)
