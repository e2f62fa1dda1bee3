"""Scores and their uncertainty: intervals of a mean, and pass@k without bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# the 97.5% quantile of the standard normal distribution, for intervals of 95%
Z = 1.959963984540054


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95% score interval of the proportion `right` / `n` (Wilson 1927).

    The interval holds every p from 0 to 1 with (right / n - p)^2 <= Z^2 p (1 - p) / n.

    Raises:
        ValueError: if `n` is 0 or `right` is not from 0 to `n`.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} of {n} is not a proportion")
    centre = (right + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(right * (n - right) / n + Z**2 / 4)
    # rounding must not move an end beyond 0 or 1
    return (0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half)


def bootstrap(values: np.ndarray, resamples: int) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a mean; the same values give the same interval.

    Args:
        values: Numbers [n].
        resamples: Number of resamples.
    """
    index = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[index].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Interval:
    """The mean of a measure over examples and its 95% interval.

    Attributes:
        mean: Mean over examples of the means over their samples.
        low: Lower end of the interval.
        high: Upper end of the interval.
        method: How the interval was computed: `wilson` or `bootstrap over examples`.
    """

    mean: float
    low: float
    high: float
    method: str


def interval_of_mean(values: Sequence[Sequence[float]], resamples: int = 2000) -> Interval:
    """Return the mean of a measure and its 95% interval: the one rule of training and evaluation.

    With one sample an example and values of 0 and 1 alone the interval is Wilson's. Otherwise it is a
    percentile bootstrap over examples. That has no width if all values are 0 or all are 1: then it is
    Wilson's, too.

    Args:
        values: The values of each example's samples.
        resamples: Number of resamples of the bootstrap.
    """
    means = np.array([sum(group) / len(group) for group in values])
    one_each = all(len(group) == 1 and group[0] in (0, 1) for group in values)
    counted = one_each or bool((means == 0).all()) or bool((means == 1).all())
    low, high = wilson(int(means.sum()), len(means)) if counted else bootstrap(means, resamples)
    return Interval(float(means.mean()), low, high, "wilson" if counted else "bootstrap over examples")


def pass_at_k(right: int, n: int, k: int) -> float:
    """Return the chance that at least one of k samples is right, drawn without replacement from n samples.

    This is 1 - C(n - right, k) / C(n, k), the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374). It is
    computed as a product, which does not overflow for large n.

    Raises:
        ValueError: if k samples can't be drawn, or `right` is not from 0 to `n`.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} can't be computed from {n} samples, {right} of them right")
    if n - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - right + 1, n + 1))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Return the mean of `pass_at_k` over examples, each given as its pair (right, n)."""
    return sum(pass_at_k(right, n, k) for right, n in counts) / len(counts)
