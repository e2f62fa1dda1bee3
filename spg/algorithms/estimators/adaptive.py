"""`omega=auto`: the share of the EUBO in the mixture, learned from the updates themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spg.core.rules import Share, checked
from spg.core.types import MaskedSamples

# maps token log-probabilities [B M T] and their samples onto parts [B T]
Bound = Callable[[Tensor, MaskedSamples], Tensor]


class AdaptiveOmega:
    """The omega of least variance over masks of the mixture's gradient, learned from earlier updates.

    With l and u the gradients of ELBO and EUBO, the gradient of the mixture is l + omega (u - l). Its
    variance is least at omega = - Cov(l, u - l) / Var(u - l), variances summed over coordinates
    (Proposition 1).

    Proposition 1 takes E[w pi^beta] in rho as known. An update estimates it from its own M draws. That makes
    u less noisy and the best omega larger, and a comparison of few draws with each other does not show it.
    So sets of draws are compared: inner updates mask the same completions afresh, and half the square
    of the difference of two successive gradients estimates the variance of what an update uses. It is
    unbiased except for the step of the weights between them, and for masks that a strategy spreads over the
    inner updates. A token's gradient is represented by its size at the token's own logit, as if scores
    pointed the same way in all draws, and those of two tokens never did; each sequence has its weight in
    the loss.

    The omega of an update comes from earlier updates alone: it is independent of the update's masks.

    Args:
        lower: The ELBO.
        upper: The EUBO.
        smoothing: How much of the earlier variances is kept at each update.
    """

    START = 0.5  # as the paper fixes it; until there is data

    @checked
    def __init__(self, lower: Bound, upper: Bound, smoothing: Share) -> None:
        self.lower = lower
        self.upper = upper
        self.smoothing = smoothing
        # exponential means of Var(l), Cov(l, u), Var(u); their ratios need no correction for the start at 0
        self.moments = (0.0, 0.0, 0.0)
        # the last set of draws: its advantages [B], which identify the rollout, and its slopes [B 2 T]
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def value(self) -> float:
        """The omega of the next update."""
        best = optimum(*self.moments)
        return self.START if best is None else min(max(best, 0.0), 1.0)

    def slopes(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Return the size of each token's gradient in ELBO and EUBO, [B 2 T], from log-probs [B M T].

        It is the derivative by each draw's log-probability, times that of the log-probability by the token's
        own logit, 1 - p; summed over the draws.
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
        """Compare a new set of draws with the one before.

        Args:
            token_logps: Log-probabilities [B M T].
            samples: The masked copies that they belong to.
            advantages: [B], the one tensor that all updates on a rollout share.
            weight: [B], of each sequence's mixture in the loss, 0 if the loss does not hold it.

        Returns:
            Figures {name: [B]}; empty for the first set of draws of a rollout.
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
        """Learn from the means of `figures` over an update's sequences.

        Returns:
            What to log of that update. `""`: the omega that it used, and nothing else if nothing is known.
            `/optimum`: the omega of least variance of its draws and those before, not clipped.
            `/variance_lower`, `/variance_used`, `/variance_upper`: the estimated variance with omega 0, as
            used and 1, per sequence that is learned from. `/spread`: standard deviation over sequences of
            the optimum of each alone, clipped to 0 to 1, mostly the noise of one comparison.
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
        """Return what a checkpoint must hold.

        Checkpoints fall between rollouts, so the last set of draws is not needed.
        """
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
    """Return the omega of least `variance`, - Cov(l, u - l) / Var(u - l); None if u - l does not vary."""
    gap = lower - 2 * cross + upper
    return (lower - cross) / gap if gap > 0 else None
