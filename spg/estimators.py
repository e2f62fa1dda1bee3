"""Likelihood estimators: per-token parts of the bounds that replace log pi(x|c) (paper, Section 3).

Every estimator maps token log-probabilities [B M T] and the samples they belong to onto parts [B T]
whose sum over T is the sequence's figure. Two scales, `normalization`:

- `per_token`, as released: the ELBO divided by the region's length n_j, the EUBO averaged over the
  tokens that at least one draw scored;
- `elbo_weight`: the sums themselves, with the weight w(t) = 1/t of the samples.

The mean over the M draws uses `samples.weight`, so that draws of unequal probability (exact
enumeration) are averaged rightly when M * probability is folded into the weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spg.limits import check_limits
from spg.types import Bounds, MaskedSamples


class LikelihoodEstimator(ABC):
    """Estimates a sequence's log-likelihood from M masked copies of it."""

    constant = False  # True: needs no log-probabilities, so the sequences need no forward pass

    def __init__(self, normalization: str = "per_token") -> None:
        check_limits(normalization=normalization)
        self.normalization = normalization

    @abstractmethod
    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return parts [B T], in nats, from log-probabilities [B M T] (any value where not scored)."""

    def _mean_over_scored(self, parts: Tensor, samples: MaskedSamples) -> Tensor:
        """Turn parts [B T] of tokens scored at least once into parts of their mean, if per token."""
        if self.normalization == "elbo_weight":
            return parts
        return parts / samples.scored.any(1).sum(-1, keepdim=True).clamp_min(1)


class ELBO(LikelihoodEstimator):
    """Lower bound, E sum_i w(t) 1(masked) log pi(x_i | z_t) (Eq. 2)."""

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        parts = (samples.weight * _where_scored(token_logps, samples)).mean(1)
        if self.normalization == "elbo_weight":
            return parts
        return parts / samples.lengths.unsqueeze(-1).clamp_min(1)


class EUBO(LikelihoodEstimator):
    """Upper bound, (1/beta) sum_i log E[w(t) 1(masked) pi^beta(x_i | z_t)] (Eq. 7), in log-space.

    The bound holds for beta >= 1, up to a constant that does not depend on the policy (Thm 1); any
    beta > 0 is computed. A token that no draw scored has no estimate and adds 0. The log stands
    outside the expectation: few draws bias the figure low.
    """

    def __init__(self, beta: float, normalization: str = "per_token") -> None:
        super().__init__(normalization)
        check_limits(beta=beta)
        self.beta = beta

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        log_mean = log_weighted_mean(token_logps, samples, self.beta)
        return self._mean_over_scored(log_mean / self.beta, samples)


class Mixture(LikelihoodEstimator):
    """omega * EUBO + (1 - omega) * ELBO (Eq. 8)."""

    def __init__(self, beta: float, omega: float, normalization: str = "per_token") -> None:
        super().__init__(normalization)
        check_limits(omega=omega)
        self.omega = omega
        self.upper = EUBO(beta, normalization)
        self.lower = ELBO(normalization)

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        upper, lower = self.upper(token_logps, samples), self.lower(token_logps, samples)
        return self.omega * upper + (1 - self.omega) * lower


class Loose(LikelihoodEstimator):
    """Looser upper bound without the log: (1/beta) sum_i (E[w(t) 1(masked) pi^beta] - 1) (Eq. 24).

    With `elbo_weight` the sum runs over the whole region, which makes it unbiased; per token it is
    the mean over tokens scored at least once, like the EUBO that it bounds.
    """

    def __init__(self, beta: float, normalization: str = "per_token") -> None:
        super().__init__(normalization)
        check_limits(beta=beta)
        self.beta = beta

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        logps = _where_scored(token_logps, samples)
        mean = (samples.weight * torch.exp(self.beta * logps)).mean(1)
        counted = samples.region if self.normalization == "elbo_weight" else samples.scored.any(1)
        return self._mean_over_scored(counted * (mean - 1) / self.beta, samples)


class Zero(LikelihoodEstimator):
    """Nothing: such traces are left out of the update ("w/o neg" in Table 3)."""

    constant = True

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        return torch.zeros_like(token_logps[:, 0])


class Sandwich:
    """Pairs the estimator of positive traces (A > 0) with that of the others (Eq. 5).

    Raises ValueError where the two are on different scales.
    """

    def __init__(self, positive: LikelihoodEstimator, negative: LikelihoodEstimator) -> None:
        if positive.normalization != negative.normalization:
            raise ValueError(
                f"positive traces use normalization={positive.normalization}, negative ones "
                f"{negative.normalization}; give both the same"
            )
        self.positive = positive
        self.negative = negative
        self.normalization = positive.normalization

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Bounds:
        """Return the parts [B T] of both figures from log-probabilities [B M T]."""
        return Bounds(self.positive(token_logps, samples), self.negative(token_logps, samples))


def _where_scored(token_logps: Tensor, samples: MaskedSamples) -> Tensor:
    return token_logps.masked_fill(~samples.scored, 0.0)


def log_weighted_mean(token_logps: Tensor, samples: MaskedSamples, beta: float) -> Tensor:
    """Return log mean_m [w 1(scored) pi^beta] for each token, [B T]; 0 where no draw scored it.

    A logsumexp over beta * log pi + log w: pi^beta underflows in float32 near log pi = -103 / beta,
    where the released code drops the token and its gradient turns NaN.
    """
    log_terms = beta * token_logps + samples.weight.clamp_min(torch.finfo(torch.float32).tiny).log()
    counted = samples.scored & (samples.weight > 0)
    seen = counted.any(1)
    # rows of -inf only would give NaN gradients: let unseen tokens have one term, and drop it after
    log_terms = log_terms.masked_fill(~counted & seen.unsqueeze(1), -torch.inf)
    log_mean = torch.logsumexp(log_terms, dim=1) - math.log(token_logps.shape[1])
    return log_mean.masked_fill(~seen, 0.0)
