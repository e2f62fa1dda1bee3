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
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spg.core.limits import check_limits
from spg.core.types import Bounds, MaskedSamples


class LikelihoodEstimator(ABC):
    """Estimates a sequence's log-likelihood from M masked copies of it."""

    constant = False  # True: needs no log-probabilities, so the sequences need no forward pass
    adaptive: AdaptiveOmega | None = None  # what `omega=auto` has learned so far

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
    """omega * EUBO + (1 - omega) * ELBO (Eq. 8).

    omega: a number, or `auto` for the one of least variance in earlier updates (`AdaptiveOmega`), whose
    variances are smoothed with `smoothing`; it needs two draws and two inner updates or more.
    """

    def __init__(
        self,
        beta: float,
        omega: float | str,
        normalization: str = "per_token",
        smoothing: float = 0.95,
    ) -> None:
        super().__init__(normalization)
        check_limits(omega=omega, smoothing=smoothing)
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
        upper, lower = self.upper(token_logps, samples), self.lower(token_logps, samples)
        return self.omega * upper + (1 - self.omega) * lower


class AdaptiveOmega:
    """The omega of least variance over masks of the mixture's gradient, learned from earlier updates.

    With l and u the gradients of ELBO and EUBO, the mixture's is l + omega (u - l), and its variance least
    at omega = - Cov(l, u - l) / Var(u - l), variances summed over coordinates (Proposition 1).

    Proposition 1 takes E[w pi^beta] in rho as known. An update estimates it from its own M draws; that makes
    u less noisy and the best omega larger, and for few draws a comparison of them with each other shows none
    of it. So sets of draws are compared: inner updates mask the same completions afresh, and half the square
    of the difference of two successive gradients estimates the variance of what an update uses, without bias
    but for the step of the weights between them (and for masks that a strategy spreads over the inner
    updates). A token's gradient is stood in for by its size at the token's own logit, as if scores pointed
    the same way in all draws and no two tokens' the same; each sequence has its weight in the loss.

    The omega of an update comes from updates before it alone: it is independent of the update's masks.
    """

    START = 0.5  # as the paper fixes it; until there is data

    def __init__(self, lower: LikelihoodEstimator, upper: LikelihoodEstimator, smoothing: float) -> None:
        check_limits(smoothing=smoothing)
        self.lower = lower
        self.upper = upper
        self.smoothing = smoothing
        # exponential means of Var(l), Cov(l, u), Var(u); their ratios need no correction for the start at 0
        self.moments = (0.0, 0.0, 0.0)
        # the last set of draws: advantages [B], by which updates on one rollout are known, and slopes [B 2 T]
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def value(self) -> float:
        """The omega of the next update."""
        best = optimum(*self.moments)
        return self.START if best is None else min(max(best, 0.0), 1.0)

    def slopes(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return the size of each token's gradient in ELBO and EUBO, [B 2 T], from log-probs [B M T].

        The derivative by each draw's log-probability, times that of the log-probability by the token's own
        logit, 1 - p; summed over the draws.
        """
        logps = token_logps.detach().masked_fill(~samples.scored, 0.0)
        with torch.enable_grad():
            leaf = logps.clone().requires_grad_()
            bounds = [bound(leaf, samples).sum() for bound in (self.lower, self.upper)]
            gradients = torch.stack([torch.autograd.grad(bound, leaf)[0] for bound in bounds], 1)
        return (gradients * -torch.expm1(logps).unsqueeze(1)).sum(2)

    def figures(
        self, token_logps: Tensor, samples: MaskedSamples, advantages: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Return what a new set of draws tells, {name: [B]}; nothing where it is a rollout's first.

        token_logps [B M T]. advantages [B]: the one tensor that all updates on a rollout share. weight [B]:
        of each sequence's mixture in the loss, 0 where it has none.
        """
        last, self._last = self._last, (advantages, self.slopes(token_logps, samples))
        if last is None or last[0] is not advantages:
            return {}
        lower, upper = (self._last[1] - last[1]).double().unbind(1)
        scale = weight.double().square() / 2
        var_lower, cross, var_upper, var_gap = (
            scale * product.sum(-1)
            for product in (lower * lower, lower * upper, upper * upper, (upper - lower).square())
        )
        known = var_gap > 0
        best = ((var_lower - cross) / var_gap.where(known, torch.ones_like(var_gap))).clamp(0, 1) * known
        figures = {"lower": var_lower, "cross": cross, "upper": var_upper, "known": known.double()}
        return figures | {"best": best, "best_squared": best.square()}

    def adapt(self, means: Mapping[str, float]) -> dict[str, float]:
        """Take in the means of `figures` over an update's sequences; return what to log of that update.

        `""`: the omega that it used, and nothing else where nothing is known; `/optimum`: of its draws and
        those before, not clipped; `/variance_lower`, `/variance_used`, `/variance_upper`: the estimated
        variance with omega 0, as used and 1, a sequence that is learned from; `/spread`: standard deviation
        over sequences of the optimum of each alone, clipped to 0 to 1, mostly the noise of one comparison.
        """
        used = self.value
        if not means.get("known"):
            return {"": used}
        new = (means["lower"], means["cross"], means["upper"])
        kept = self.smoothing
        lower, cross, upper = (kept * a + (1 - kept) * b for a, b in zip(self.moments, new, strict=True))
        self.moments = (lower, cross, upper)
        mean, square = means["best"] / means["known"], means["best_squared"] / means["known"]
        best = optimum(*new)
        return {
            "": used,
            **({} if best is None else {"/optimum": best}),
            "/spread": math.sqrt(max(square - mean**2, 0.0)),
            "/variance_lower": variance(0.0, *new),
            "/variance_used": variance(used, *new),
            "/variance_upper": variance(1.0, *new),
        }

    def state(self) -> list[float]:
        """Return what a checkpoint must hold: it stands between rollouts, where draws are not compared."""
        return list(self.moments)

    def restore(self, state: Sequence[float] | None) -> None:
        """Take `state` back; None begins anew."""
        lower, cross, upper = state or (0.0, 0.0, 0.0)
        self.moments = (lower, cross, upper)
        self._last = None


def variance(omega: float, lower: float, cross: float, upper: float) -> float:
    """Return the variance of (1 - omega) l + omega u from Var(l), Cov(l, u) and Var(u)."""
    return (1 - omega) ** 2 * lower + 2 * omega * (1 - omega) * cross + omega**2 * upper


def optimum(lower: float, cross: float, upper: float) -> float | None:
    """Return the omega of least `variance`, - Cov(l, u - l) / Var(u - l); None where u - l does not vary."""
    gap = lower - 2 * cross + upper
    return (lower - cross) / gap if gap > 0 else None


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
