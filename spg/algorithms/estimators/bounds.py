"""The bounds: ELBO, EUBO, their mixture, a looser upper bound, and the constant 0."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from spg.algorithms.estimators.adaptive import AdaptiveOmega
from spg.algorithms.estimators.base import LikelihoodEstimator, Normalization
from spg.core.rules import Positive, Probability, Share, checked
from spg.core.types import MaskedSamples


class ELBO(LikelihoodEstimator):
    """Lower bound, E sum_i w(t) 1(masked) log pi(x_i | z_t) (Eq. 2)."""

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return parts [B T] in nats, from log-probabilities [B M T]."""
        parts = (samples.weight * _zero_unscored(token_logps, samples)).mean(1)
        if self.normalization == "elbo_weight":
            return parts
        return parts / samples.lengths.unsqueeze(-1).clamp_min(1)


class EUBO(LikelihoodEstimator):
    """Upper bound, (1/beta) sum_i log E[w(t) 1(masked) pi^beta(x_i | z_t)] (Eq. 7), in log-space.

    The bound holds for beta >= 1, up to a constant that does not depend on the policy (Theorem 1); any
    beta > 0 is computed. A token that no draw scored has no estimate and adds 0. The log is
    outside the expectation: few draws bias the estimate low.
    """

    @checked
    def __init__(self, beta: Positive, normalization: Normalization = "per_token") -> None:
        super().__init__(normalization)
        self.beta = beta

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return parts [B T] in nats, from log-probabilities [B M T]."""
        log_mean = log_weighted_mean(token_logps, samples, self.beta)
        return self._mean_over_scored(log_mean / self.beta, samples)


class Mixture(LikelihoodEstimator):
    """omega * EUBO + (1 - omega) * ELBO (Eq. 8).

    Args:
        beta: The EUBO's exponent.
        omega: A number, or `auto` for the one of least variance in earlier updates (`AdaptiveOmega`), which
            needs two draws and two inner updates or more.
        normalization: The scale of both bounds.
        smoothing: How much of the earlier variances `auto` keeps at each update.
    """

    @checked
    def __init__(
        self,
        beta: Positive,
        omega: Probability | Literal["auto"],
        normalization: Normalization = "per_token",
        smoothing: Share = 0.95,
    ) -> None:
        super().__init__(normalization)
        self.upper = EUBO(beta, normalization)
        self.lower = ELBO(normalization)
        self.fixed = omega
        if isinstance(omega, str):
            self.adaptive = AdaptiveOmega(self.lower, self.upper, smoothing)

    @property
    def omega(self) -> float:
        """The share of the EUBO, now."""
        if self.adaptive is not None:
            return self.adaptive.value
        assert not isinstance(self.fixed, str)
        return self.fixed

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return parts [B T] in nats, from log-probabilities [B M T]."""
        upper, lower = self.upper(token_logps, samples), self.lower(token_logps, samples)
        return self.omega * upper + (1 - self.omega) * lower


class Loose(LikelihoodEstimator):
    """Looser upper bound without the log: (1/beta) sum_i (E[w(t) 1(masked) pi^beta] - 1) (Eq. 24).

    With `elbo_weight` the sum runs over the whole region, which makes it unbiased. Per token it is
    the mean over tokens that some draw scored, like the EUBO, which it bounds from above.
    """

    @checked
    def __init__(self, beta: Positive, normalization: Normalization = "per_token") -> None:
        super().__init__(normalization)
        self.beta = beta

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return parts [B T] in nats, from log-probabilities [B M T]."""
        logps = _zero_unscored(token_logps, samples)
        mean = (samples.weight * torch.exp(self.beta * logps)).mean(1)
        counted = samples.region if self.normalization == "elbo_weight" else samples.scored.any(1)
        return self._mean_over_scored(counted * (mean - 1) / self.beta, samples)


class Zero(LikelihoodEstimator):
    """Nothing: such traces are left out of the update ("w/o neg" in Table 3)."""

    constant = True

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return parts [B T] in nats, from log-probabilities [B M T]."""
        return torch.zeros_like(token_logps[:, 0])


def _zero_unscored(token_logps: Tensor, samples: MaskedSamples) -> Tensor:
    return token_logps.masked_fill(~samples.scored, 0.0)


def log_weighted_mean(token_logps: Tensor, samples: MaskedSamples, beta: float) -> Tensor:
    """Return log mean_m [w 1(scored) pi^beta] for each token, [B T]; 0 for a token that no draw scored.

    It is a logsumexp over beta * log pi + log w: pi^beta underflows in float32 near log pi = -103 / beta,
    and there the released code drops the token, and its gradient turns NaN.
    """
    log_terms = beta * token_logps + samples.weight.clamp_min(torch.finfo(torch.float32).tiny).log()
    counted = samples.scored & (samples.weight > 0)
    seen = counted.any(1)
    # rows of -inf only would give NaN gradients: let unseen tokens have one term, and drop it after
    log_terms = log_terms.masked_fill(~counted & seen.unsqueeze(1), -torch.inf)
    log_mean = torch.logsumexp(log_terms, dim=1) - math.log(token_logps.shape[1])
    return log_mean.masked_fill(~seen, 0.0)
