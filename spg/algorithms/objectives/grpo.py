"""GRPO for masked diffusion: clipped ratios under the masks of the update.

One loss, of which diffu-GRPO (D1, arXiv 2504.12216), coupled-GRPO (arXiv 2506.20639), UniGRPO (arXiv
2505.15809) and step-wise policy gradients are settings; what sets these apart is mostly their masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spg.algorithms.objectives.terms import clipped, divergence, kl_estimates, own_shares, required
from spg.core.limits import check_limits
from spg.core.types import Cohort, Experience, MaskedSamples


class GRPO:
    """Minus the clipped surrogate min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), plus a KL divergence.

    ratio: of the policy to the one that made the rollout, under the same masks. `token`: one for each
    scored token of each draw; `step`: one for each draw, the product of its scored tokens' ratios (where
    draws are decoding steps: the probability of what the step committed).
    average: `tokens`, every scored token counts the same; `draws`, the mean over each draw's scored
    tokens, then over the draws that score any; `sum`, summed over a sequence, the mean over sequences.
    With ratio=step a draw has one term, which counts once in `draws` and `sum`. loss_norm: the average
    is taken over each prompt's group, and the groups averaged (`group`), or over the whole update (`batch`).
    kl_coef: of the KL divergence per scored token to the model before training (kl_to=`reference`) or to
    the policy that made the rollout (`old`). kl_average: `same`, averaged over tokens and draws as above;
    `sum`, summed over a draw's tokens and averaged over draws. epsilon_high: None for epsilon.
    Raises ValueError for ratio=step with average=tokens.
    """

    def __init__(
        self,
        epsilon: float,
        ratio: str = "token",
        average: str = "tokens",
        loss_norm: str = "group",
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        kl_to: str = "reference",
        kl_average: str = "same",
        epsilon_high: float | None = None,
    ) -> None:
        check_limits(epsilon=epsilon, ratio=ratio, average=average, loss_norm=loss_norm, kl_coef=kl_coef)
        check_limits(kl_estimator=kl_estimator, kl_to=kl_to, kl_average=kl_average, epsilon_high=epsilon_high)
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
        """Return bool [B]: sequences whose advantage is not 0; all, where the loss has a KL divergence."""
        return (experience.advantages != 0) | (self.kl_coef > 0)

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

        reference [B M T]: needed with kl_coef > 0 and kl_to=reference; ValueError where it is missing then.
        old [B M T]: log-probabilities of the policy that made the rollout; None where that is this one.
        """
        if cohort is None:
            cohort = Cohort.of(experience, samples)
        if old is None:
            old = token_logps.detach()
        log_ratio = (token_logps - old).masked_fill(~samples.scored, 0.0)
        counted = samples.scored
        if self.ratio == "step":
            log_ratio, counted = log_ratio.sum(-1, keepdim=True), counted.any(-1, keepdim=True)
        terms, ratio, active = clipped(log_ratio, experience.advantages, self.epsilon, self.epsilon_high)
        loss = -self._averaged(terms, counted, cohort, self.average).sum()
        number = counted.sum((1, 2)).clamp_min(1)
        figures = {
            "ratio": (ratio * counted).sum((1, 2)) / number,
            "clip_ratio": (active & counted).sum((1, 2)) / number,
        }
        if self.kl_coef > 0:
            other = old
            if self.kl_to == "reference":
                other = required(reference, "reference", f"kl_coef={self.kl_coef} with kl_to=reference")
            figures["kl"] = divergence(token_logps, other, samples, self.kl_estimator)
            excess = kl_estimates((other - token_logps).masked_fill(~samples.scored, 0.0), self.kl_estimator)
            average = self.average if self.kl_average == "same" else "summed draws"
            loss = loss + self.kl_coef * self._averaged(excess, samples.scored, cohort, average).sum()
        return loss, {name: figure.detach() for name, figure in figures.items()}

    def _averaged(self, terms: Tensor, counted: Tensor, cohort: Cohort, average: str) -> Tensor:
        """Return each sequence's share [B] of the average of terms [B M K] where `counted` [B M K]."""
        draws = torch.where(counted, terms, 0.0).sum(-1)
        if average == "draws":
            draws = draws / counted.sum(-1).clamp_min(1)
        sizes = {"tokens": cohort.scored, "sum": torch.ones_like(cohort.scored)}.get(average, cohort.draws)
        return own_shares(draws.sum(-1), sizes, cohort, self.loss_norm)
