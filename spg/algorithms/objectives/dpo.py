"""DPO with bounds in place of log-likelihoods: VRPO (LLaDA 1.5, arXiv 2505.19223)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spg.algorithms.estimators import LikelihoodEstimator
from spg.algorithms.objectives.terms import required
from spg.core.combinations import check_sums
from spg.core.limits import check_limits
from spg.core.types import Cohort, Experience, MaskedSamples


class DPO:
    """- log sigmoid(dpo_beta ((B - B_ref)(chosen) - (B - B_ref)(rejected))), the mean over preferences.

    A group holds two sequences, of which the one with the higher advantage is chosen; a tie is no
    preference and teaches nothing. B and B_ref are the bounds of the policy and of the model before
    training under the same masks (VRPO's antithetic sampling). sft_coef: of minus B(chosen) a position of
    its region, added to each preference's loss.
    Raises ValueError where the estimator's normalization is not elbo_weight.
    """

    # for the configuration check: see spg.config.parts
    needs_sums = True
    completions_per_prompt = 2

    def __init__(self, estimator: LikelihoodEstimator, dpo_beta: float, sft_coef: float = 0.0) -> None:
        check_limits(dpo_beta=dpo_beta, sft_coef=sft_coef)
        check_sums(estimator.normalization, estimator.adaptive is not None, "DPO")
        self.estimator = estimator
        self.dpo_beta = dpo_beta
        self.sft_coef = sft_coef
        self.needs = frozenset({"reference"})

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences of a pair with a preference; ValueError for groups that are no pairs."""
        other = partners(experience.rollout.group)
        return experience.advantages != experience.advantages[other]

    def __call__(
        self,
        token_logps: Tensor,
        samples: MaskedSamples,
        experience: Experience,
        cohort: Cohort | None = None,
        reference: Tensor | None = None,
        old: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (this process's share of the loss [], figures {name: [B]}) of samples' [B M T].

        reference [B M T]: ValueError where it is missing; so for groups that are no pairs. Both sequences
        of a pair have its margin, dpo_beta ((B - B_ref)(chosen) - ...), as their figure.
        """
        if cohort is None:
            cohort = Cohort.of(experience, samples)
        advantages, other = experience.advantages, partners(experience.rollout.group)
        preferred = cohort.advantages > cohort.advantages[partners(cohort.group)]
        preferences = preferred.sum().clamp_min(1)
        bound = self.estimator(token_logps, samples).sum(-1)
        before = self.estimator(required(reference, "reference", "DPO"), samples).sum(-1)
        gain = self.dpo_beta * (bound - before)
        margin = (gain - gain[other]) * (advantages - advantages[other]).sign()
        losses = -logsigmoid(margin)
        if self.sft_coef > 0:
            losses = losses - self.sft_coef * bound / samples.lengths.clamp_min(1)
        loss = (losses * (advantages > advantages[other])).sum() / preferences
        figures = {"dpo/margin": margin, "dpo/accuracy": (margin > 0).float(), "bound/lower": bound}
        return loss, {name: figure.detach() for name, figure in figures.items()}


def partners(group: Tensor) -> Tensor:
    """Return the row of each sequence's pair [N], from group numbers [N]; ValueError where one has none."""
    together = group.unsqueeze(1) == group
    if bool((together.sum(1) != 2).any()):
        sizes = sorted(set(together.sum(1).tolist()))
        raise ValueError(f"DPO compares two completions, but groups hold {sizes}; set group_size=2")
    return (together & ~torch.eye(len(group), dtype=torch.bool, device=group.device)).long().argmax(1)
