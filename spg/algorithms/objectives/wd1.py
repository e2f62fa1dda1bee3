"""WD1: weighted log-likelihoods, without ratios (arXiv 2507.08838)."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.algorithms.estimators import LikelihoodEstimator
from spg.algorithms.objectives.base import ObjectiveResult
from spg.algorithms.objectives.terms import LossNorm, count_groups, same_group
from spg.core.combinations import check_sums
from spg.core.rules import checked
from spg.core.types import Experience, UpdateBatch


class WD1:
    """- sum_j w+_j S_j + sum_j w-_j S_j, with w+ = softmax(A), w- = softmax(-A) and S the log-likelihood.

    Args:
        estimator: Estimates the log-likelihood S.
        positive_only: Leave out the second sum.
        loss_norm: `group`: the softmax runs over the sequences of one prompt, and the prompts' losses are
            averaged; `batch`: it runs over all sequences of the update.

    Raises:
        ValueError: if the estimator's normalization is not elbo_weight.
    """

    # facts for the configuration check, see spg.config.parts
    needs_sums = True
    couples = "sequence"  # weights come from the cohort

    @checked
    def __init__(
        self, estimator: LikelihoodEstimator, positive_only: bool = False, loss_norm: LossNorm = "group"
    ) -> None:
        check_sums(estimator.normalization, estimator.adaptive is not None, "WD1")
        self.estimator = estimator
        self.positive_only = positive_only
        self.loss_norm = loss_norm
        self.needs: frozenset[str] = frozenset()

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences of groups whose advantages differ; all, if equal ones count too."""
        if self.positive_only or self.loss_norm == "batch":
            return torch.ones_like(experience.advantages, dtype=torch.bool)
        group, advantages = experience.rollout.group, experience.advantages
        return (same_group(group) & (advantages.unsqueeze(1) != advantages)).any(1)

    def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
        """Compute the loss from log-probabilities [B M T]."""
        cohort = batch.cohort
        bound = self.estimator(token_logps, batch.samples).sum(-1)
        raised, lowered = self.weights(cohort.advantages, cohort.group)
        weights = raised if self.positive_only else raised - lowered
        return ObjectiveResult(-(weights[cohort.own] * bound).sum(), {"bound/lower": bound})

    def weights(self, advantages: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return (w+, w-), each [N], of advantages [N] and group numbers [N]; each sums to 1."""
        together = same_group(group) if self.loss_norm == "group" else same_group(torch.zeros_like(group))
        num_groups = count_groups(together)

        def softmax(values: Tensor) -> Tensor:
            rows = values.expand(len(values), -1).masked_fill(~together, -torch.inf)
            return rows.softmax(-1).diagonal() / num_groups

        return softmax(advantages), softmax(-advantages)
