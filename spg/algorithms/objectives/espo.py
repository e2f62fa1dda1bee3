"""ESPO: one clipped ratio of ELBOs for each sequence (arXiv 2512.03759)."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.algorithms.estimators import LikelihoodEstimator
from spg.algorithms.objectives.terms import clipped, kl_estimates, own_shares, required
from spg.core.combinations import check_sums
from spg.core.limits import check_limits
from spg.core.types import Cohort, Experience, MaskedSamples


class ESPO:
    """Minus min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = exp((B - B_old) / n), plus a KL estimate.

    B is the log-likelihood bound of a sequence, B_old that of the policy that made the rollout under the
    same masks, n the number of positions in its region. kl_coef: of (B_ref - B)^2 / (2 n), nats a token, to
    the model before training. The loss is the mean over each prompt's sequences, and over prompts
    (loss_norm=`group`), or over all sequences (`batch`). epsilon_high: None for epsilon.
    Raises ValueError where the estimator's normalization is not elbo_weight.
    """

    # for the configuration check: see spg.config.parts
    needs_sums = True

    def __init__(
        self,
        estimator: LikelihoodEstimator,
        epsilon: float,
        epsilon_high: float | None = None,
        kl_coef: float = 0.0,
        loss_norm: str = "group",
    ) -> None:
        check_limits(epsilon=epsilon, epsilon_high=epsilon_high, kl_coef=kl_coef, loss_norm=loss_norm)
        check_sums(estimator.normalization, estimator.adaptive is not None, "ESPO")
        self.estimator = estimator
        self.epsilon = epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high
        self.kl_coef = kl_coef
        self.loss_norm = loss_norm
        self.needs = frozenset({"old", "reference"} if kl_coef > 0 else {"old"})

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

        reference [B M T]: needed with kl_coef > 0; ValueError where it is missing then. old [B M T]:
        log-probabilities of the policy that made the rollout; None where that is this one.
        """
        if cohort is None:
            cohort = Cohort.of(experience, samples)
        bound = self.estimator(token_logps, samples).sum(-1)
        before = bound.detach() if old is None else self.estimator(old, samples).sum(-1)
        lengths = samples.lengths.clamp_min(1)
        terms, ratio, active = clipped(
            (bound - before) / lengths, experience.advantages, self.epsilon, self.epsilon_high
        )
        ones = torch.ones_like(cohort.lengths)
        loss = -own_shares(terms, ones, cohort, self.loss_norm).sum()
        figures = {"bound/lower": bound, "ratio": ratio, "clip_ratio": active.float()}
        if self.kl_coef > 0:
            other = required(reference, "reference", f"kl_coef={self.kl_coef}")
            figures["kl"] = kl_estimates(self.estimator(other, samples).sum(-1) - bound, "k2") / lengths
            loss = loss + self.kl_coef * own_shares(figures["kl"], ones, cohort, self.loss_norm).sum()
        return loss, {name: figure.detach() for name, figure in figures.items()}
