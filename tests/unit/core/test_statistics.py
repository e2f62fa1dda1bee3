"""pass@k against its definition, intervals against the equation that they solve and published values."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from spg.core.statistics import Z, bootstrap, mean_pass_at_k, pass_at_k, wilson


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(right, n, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_its_closed_form_where_binomials_are_huge() -> None:
    for n, right, k in ((200, 3, 100), (5000, 17, 250), (100_000, 2, 40_000), (3000, 2999, 1)):
        exact = 1 - Fraction(math.comb(n - right, k), math.comb(n, k))
        assert pass_at_k(right, n, k) == pytest.approx(float(exact), rel=1e-9)
    assert pass_at_k(0, 10**9, 10**8) == 0.0
    assert pass_at_k(1, 4, 4) == 1.0
    assert mean_pass_at_k([(1, 2), (0, 2), (2, 2)], 1) == pytest.approx(0.5)


def test_pass_at_k_estimates_without_bias() -> None:
    """Its mean over all draws of n samples is 1 - (1 - p)^k."""
    p, n, k = 0.3, 6, 3
    weights = [math.comb(n, right) * p**right * (1 - p) ** (n - right) for right in range(n + 1)]
    mean = sum(weight * pass_at_k(right, n, k) for right, weight in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("right", "n", "k"), [(0, 3, 4), (4, 3, 1), (1, 3, 0), (-1, 3, 1)])
def test_pass_at_k_of_what_can_t_be_is_refused(right: int, n: int, k: int) -> None:
    with pytest.raises(ValueError, match="can't be computed"):
        pass_at_k(right, n, k)


def solved(right: int, n: int, low: float, high: float) -> float:
    """Solve |right / n - p| = Z sqrt(p (1 - p) / n) for p between low and high, by bisection."""

    def outside(p: float) -> bool:
        return (right / n - p) ** 2 > Z**2 * p * (1 - p) / n

    at_low = outside(low)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle) == at_low else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize(("right", "n"), [(1, 1), (0, 4), (1, 10), (53, 256), (130, 500), (783, 1130)])
def test_wilson_s_interval_solves_the_score_equation(right: int, n: int) -> None:
    low, high = wilson(right, n)
    assert low == pytest.approx(solved(right, n, 0.0, right / n) if right else 0.0, abs=1e-12)
    assert high == pytest.approx(solved(right, n, right / n, 1.0) if right < n else 1.0, abs=1e-12)


def test_wilson_s_interval_agrees_with_published_values() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, 857), Table I, method 3."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), interval in published.items():
        assert wilson(right, n) == pytest.approx(interval, abs=5e-5)
        low, high = wilson(n - right, n)
        assert (1 - high, 1 - low) == pytest.approx(interval, abs=5e-5)
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(0, 0)


def test_the_normal_s_quantile() -> None:
    assert math.erf(Z / math.sqrt(2)) == pytest.approx(0.95, abs=1e-15)


def test_bootstrap_agrees_with_the_mean_s_distribution() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap(values, 4000)
    half = Z * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)
    assert bootstrap(values, 4000) == (low, high)
    assert bootstrap(np.full(3, 0.25), 100) == (0.25, 0.25)
