"""DPO with bounds in place of log-likelihoods: VRPO (LLaDA 1.5, arXiv 2505.19223)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spg.algorithms.estimators import LikelihoodEstimator
from spg.algorithms.objectives.base import ObjectiveResult
from spg.algorithms.objectives.terms import require_reference
from spg.core.combinations import check_sums
from spg.core.rules import NotNegative, Positive, checked
from spg.core.types import Experience, UpdateBatch


class DPO:
    """- log sigmoid(dpo_beta ((B - B_ref)(chosen) - (B - B_ref)(rejected))), the mean over preferences.

    A group holds two sequences, of which the one with the higher advantage is chosen; a tie is no
    preference and teaches nothing. B and B_ref are the bounds of the policy and of the model before
    training under the same masks (VRPO's antithetic sampling).

    Args:
        estimator: Estimates the bound B.
        dpo_beta: How strongly the policy is held to the model before training.
        sft_coef: Coefficient of minus B(chosen) per position of its region, added to each preference's loss.

    Raises:
        ValueError: if the estimator's normalization is not elbo_weight.
    """

    # facts for the configuration check, see spg.config.parts
    needs_sums = True
    completions_per_prompt = 2
    couples = "group"

    @checked
    def __init__(
        self, estimator: LikelihoodEstimator, dpo_beta: Positive, sft_coef: NotNegative = 0.0
    ) -> None:
        check_sums(estimator.normalization, estimator.adaptive is not None, "DPO")
        self.estimator = estimator
        self.dpo_beta = dpo_beta
        self.sft_coef = sft_coef
        self.needs = frozenset({"reference"})
        self._pairs: Tensor | None = None  # the last group numbers that were found to be of pairs

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences of a pair with a preference; ValueError if groups are not pairs."""
        other = self._find(experience.rollout.group)
        return experience.advantages != experience.advantages[other]

    def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
        """Compute the loss from log-probabilities [B M T].

        Both sequences of a pair have its margin, dpo_beta ((B - B_ref)(chosen) - ...), as their figure.

        Raises:
            ValueError: if the batch has no reference, or groups are not pairs.
        """
        samples, cohort, advantages = batch.samples, batch.cohort, batch.experience.advantages
        group = batch.experience.rollout.group
        other = _partners(group) if batch.is_part else self._find(group)  # the whole batch was checked
        preferred = cohort.advantages > cohort.advantages[_partners(cohort.group)]
        preferences = preferred.sum().clamp_min(1)
        bound = self.estimator(token_logps, samples).sum(-1)
        before = self.estimator(require_reference(batch, "DPO"), samples).sum(-1)
        gain = self.dpo_beta * (bound - before)
        margin = (gain - gain[other]) * (advantages - advantages[other]).sign()
        losses = -logsigmoid(margin)
        if self.sft_coef > 0:
            losses = losses - self.sft_coef * bound / samples.lengths.clamp_min(1)
        loss = (losses * (advantages > advantages[other])).sum() / preferences
        figures = {"dpo/margin": margin, "dpo/accuracy": (margin > 0).float(), "bound/lower": bound}
        return ObjectiveResult(loss, figures)

    def _find(self, group: Tensor) -> Tensor:
        """Return `partners`; the device is waited for once, though an update asks several times."""
        if group is not self._pairs:
            found, self._pairs = partners(group), group
            return found
        return _partners(group)


def partners(group: Tensor) -> Tensor:
    """Return the row of each sequence's partner [N], from group numbers [N].

    Raises:
        ValueError: if a group does not hold two sequences.
    """
    together = group.unsqueeze(1) == group
    if bool((together.sum(1) != 2).any()):
        sizes = sorted(set(together.sum(1).tolist()))
        raise ValueError(f"DPO compares two completions, but groups hold {sizes}; set group_size=2")
    return _partners(group)


def _partners(group: Tensor) -> Tensor:
    """Return `partners` of groups that hold two sequences."""
    together = group.unsqueeze(1) == group
    return (together & ~torch.eye(len(group), dtype=torch.bool, device=group.device)).long().argmax(1)
