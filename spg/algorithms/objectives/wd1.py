"""WD1: weighted log-likelihoods, without ratios (arXiv 2507.08838)."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.algorithms.estimators import LikelihoodEstimator
from spg.core.combinations import check_sums
from spg.core.limits import check_limits
from spg.core.types import Cohort, Experience, MaskedSamples


class WD1:
    """- sum_j w+_j S_j + sum_j w-_j S_j, with w+ = softmax(A), w- = softmax(-A) and S the log-likelihood.

    The softmax runs over each prompt's group, and the groups' losses are averaged (loss_norm=`group`), or
    over all sequences of the update (`batch`). positive_only: leave out the second sum.
    Raises ValueError where the estimator's normalization is not elbo_weight.
    """

    # for the configuration check: see spg.config.parts
    needs_sums = True

    def __init__(
        self, estimator: LikelihoodEstimator, positive_only: bool = False, loss_norm: str = "group"
    ) -> None:
        check_limits(positive_only=positive_only, loss_norm=loss_norm)
        check_sums(estimator.normalization, estimator.adaptive is not None, "WD1")
        self.estimator = estimator
        self.positive_only = positive_only
        self.loss_norm = loss_norm
        self.needs: frozenset[str] = frozenset()

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences of groups whose advantages differ; all, where equal ones count too."""
        if self.positive_only or self.loss_norm == "batch":
            return torch.ones_like(experience.advantages, dtype=torch.bool)
        group, advantages = experience.rollout.group, experience.advantages
        return (same(group) & (advantages.unsqueeze(1) != advantages)).any(1)

    def __call__(
        self,
        token_logps: Tensor,
        samples: MaskedSamples,
        experience: Experience,
        cohort: Cohort | None = None,
        reference: Tensor | None = None,
        old: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (this process's share of the loss [], figures {name: [B]}) of samples' [B M T]."""
        if cohort is None:
            cohort = Cohort.of(experience, samples)
        bound = self.estimator(token_logps, samples).sum(-1)
        raised, lowered = self.weights(cohort.advantages, cohort.group)
        weights = raised if self.positive_only else raised - lowered
        loss = -(weights[cohort.own] * bound).sum()
        return loss, {"bound/lower": bound.detach()}

    def weights(self, advantages: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return (w+, w-), each [N], of advantages [N] and group numbers [N]; each sums to 1."""
        together = same(group) if self.loss_norm == "group" else same(torch.zeros_like(group))
        num_groups = len(torch.unique(group)) if self.loss_norm == "group" else 1

        def softmax(values: Tensor) -> Tensor:
            rows = values.expand(len(values), -1).masked_fill(~together, -torch.inf)
            return rows.softmax(-1).diagonal() / num_groups

        return softmax(advantages), softmax(-advantages)


def same(group: Tensor) -> Tensor:
    """Return bool [N N]: whether two sequences belong to one group, by their group numbers [N]."""
    return group.unsqueeze(1) == group
