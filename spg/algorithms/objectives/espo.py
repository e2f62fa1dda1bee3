"""ESPO: one clipped ratio of ELBOs for each sequence (arXiv 2512.03759)."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.algorithms.estimators import LikelihoodEstimator
from spg.algorithms.objectives.base import ObjectiveResult
from spg.algorithms.objectives.terms import (
    LossNorm,
    clip_surrogate,
    kl_estimates,
    normalize_own,
    require_reference,
)
from spg.core.combinations import check_sums
from spg.core.rules import NotNegative, Share, checked
from spg.core.types import Experience, UpdateBatch


class ESPO:
    """Minus min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = exp((B - B_old) / n), plus a KL estimate.

    B is the log-likelihood bound of a sequence, B_old that of the policy that made the rollout under the
    same masks, n the number of positions in its region.

    Args:
        estimator: Estimates the bound B.
        epsilon: How far below 1 the ratio may go.
        epsilon_high: How far above 1 the ratio may go; None for epsilon.
        kl_coef: Coefficient of (B_ref - B)^2 / (2 n), in nats per token, to the model before training.
        loss_norm: `group`: the loss is the mean over each prompt's sequences, then over prompts; `batch`: the
            mean over all sequences.

    Raises:
        ValueError: if the estimator's normalization is not elbo_weight.
    """

    # facts for the configuration check, see spg.config.parts
    needs_sums = True
    couples = "sequence"

    @checked
    def __init__(
        self,
        estimator: LikelihoodEstimator,
        epsilon: Share,
        epsilon_high: NotNegative | None = None,
        kl_coef: NotNegative = 0.0,
        loss_norm: LossNorm = "group",
    ) -> None:
        check_sums(estimator.normalization, estimator.adaptive is not None, "ESPO")
        self.estimator = estimator
        self.epsilon = epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high
        self.kl_coef = kl_coef
        self.loss_norm = loss_norm
        self.needs = frozenset({"old", "reference"} if kl_coef > 0 else {"old"})

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences whose advantage is not 0; all, if the loss has a KL divergence."""
        return (experience.advantages != 0) | (self.kl_coef > 0)

    def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
        """Compute the loss from log-probabilities [B M T].

        Raises:
            ValueError: if kl_coef > 0 and the batch has no reference.
        """
        samples, cohort = batch.samples, batch.cohort
        bound = self.estimator(token_logps, samples).sum(-1)
        before = bound.detach() if batch.old is None else self.estimator(batch.old, samples).sum(-1)
        lengths = samples.lengths.clamp_min(1)
        terms, ratio, active = clip_surrogate(
            (bound - before) / lengths, batch.experience.advantages, self.epsilon, self.epsilon_high
        )
        ones = torch.ones_like(cohort.lengths)
        loss = -normalize_own(terms, ones, cohort, self.loss_norm).sum()
        figures = {"bound/lower": bound, "ratio": ratio, "clip_ratio": active.float()}
        if self.kl_coef > 0:
            reference = require_reference(batch, f"kl_coef={self.kl_coef}")
            other = self.estimator(reference, samples).sum(-1)
            figures["kl"] = kl_estimates(other - bound, "k2") / lengths
            loss = loss + self.kl_coef * normalize_own(figures["kl"], ones, cohort, self.loss_norm).sum()
        return ObjectiveResult(loss, figures)
