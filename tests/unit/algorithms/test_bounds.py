"""The bounds against exact enumeration: nothing here is sampled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from spg.algorithms.estimators import ELBO, EUBO, LikelihoodEstimator, Loose, Mixture, Sandwich, Zero
from spg.algorithms.objectives.spg import SPG
from spg.core.types import MaskedSamples, UpdateBatch
from tests import enumeration as exact
from tests.helpers import experience_of

CASES = [(n, v, t) for n in (2, 3, 4) for v in (2, 3) for t in (2, 3, 5) if v**n <= 27]


def sequences(toy: exact.Toy) -> list[exact.State]:
    return list(itertools.product(range(toy.symbols), repeat=toy.n))


@pytest.mark.parametrize(("n", "symbols", "steps"), CASES)
def test_probabilities_sum_to_one(n: int, symbols: int, steps: int) -> None:
    toy = exact.make_toy(n, symbols, steps, seed=0)
    assert sum(exact.probability(toy, x) for x in sequences(toy)) == pytest.approx(1.0, abs=1e-12)


def holds(toy: exact.Toy, beta: float, upper=exact.eubo, lower=exact.elbo) -> bool:
    """Return whether lower <= log p <= upper + C(T) for every sequence of a toy."""
    for x in sequences(toy):
        log_p = np.log(exact.probability(toy, x))
        if lower(toy, x) > log_p + 1e-9:
            return False
        if upper(toy, x, beta) + exact.log_constant(toy, x, beta) < log_p - 1e-9:
            return False
    return True


@pytest.mark.parametrize(("n", "symbols", "steps"), CASES)
@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, "n", "n+1"])
def test_the_sandwich_holds(n: int, symbols: int, steps: int, beta: float | str) -> None:
    number = {"n": float(n), "n+1": n + 1.0}.get(str(beta), beta)
    for seed in range(3):
        assert holds(exact.make_toy(n, symbols, steps, seed), float(number))


def test_without_its_constant_the_eubo_can_lie_below_for_beta_under_n() -> None:
    toys = [exact.make_toy(3, 3, 4, seed) for seed in range(10)]
    assert any(
        exact.eubo(toy, x, 1.0) < np.log(exact.probability(toy, x)) for toy in toys for x in sequences(toy)
    )


def test_planted_errors_are_noticed() -> None:
    """The check must be able to fail: in the sharp case beta = n each of these slips shows."""

    def no_weight(toy: exact.Toy, x: exact.State, beta: float) -> float:
        """Theorem 1 with the weight left out of the lower side's sign: a weight counted twice."""
        return sum(
            np.log(
                sum(
                    q * w * w * toy.table[z][i, x[i]] ** beta
                    for q, w, z in exact.token_terms(toy, x)
                    if z[i] < 0
                )
            )
            / beta
            for i in range(toy.n)
        )

    def beta_outside(toy: exact.Toy, x: exact.State, beta: float) -> float:
        """Beta multiplies the log instead of standing in the exponent."""
        return exact.eubo(toy, x, 1.0) * beta

    def no_root(toy: exact.Toy, x: exact.State, beta: float) -> float:
        """1 / beta forgotten."""
        return exact.eubo(toy, x, beta) * beta

    def unweighted_elbo(toy: exact.Toy, x: exact.State) -> float:
        """The ELBO with the weight dropped from half of its terms."""
        return exact.elbo(toy, x) / 2

    toys = [exact.make_toy(3, 2, 4, seed) for seed in range(5)]
    assert all(holds(toy, 3.0) for toy in toys)
    for slip in (no_weight, beta_outside, no_root):
        assert not all(holds(toy, 3.0, upper=slip) for toy in toys), slip.__name__
    assert not all(holds(toy, 3.0, lower=unweighted_elbo) for toy in toys)


def test_equality_where_the_order_does_not_matter() -> None:
    """One distribution a position: every path has the same likelihood, and both bounds meet it."""
    for n, steps in ((2, 3), (3, 4)):
        toy = exact.make_toy(n, 2, steps, seed=1, order_free=True)
        for x in sequences(toy):
            log_p = np.log(exact.probability(toy, x))
            assert exact.elbo(toy, x) == pytest.approx(log_p, abs=1e-10)
            assert exact.eubo(toy, x, float(n)) == pytest.approx(log_p, abs=1e-10)


def enumerated(toy: exact.Toy, x: exact.State) -> tuple[Tensor, MaskedSamples]:
    """Return log-probabilities [1 M n] and samples that hold every (time, mask) with its probability.

    Each pair stands for T draws' share: the sum over t is T times a mean, so the weight of a row is
    M times probability times r_t.
    """
    terms = [(q, w, z) for q, w, z in exact.token_terms(toy, x) if q > 0]
    m = len(terms)
    scored = torch.tensor([[v == exact.MASK for v in z] for _, _, z in terms])
    weight = torch.tensor([[m * q * w] for q, w, _ in terms], dtype=torch.double) * scored
    logps = torch.tensor(
        np.array([[np.log(toy.table[z][i, x[i]]) for i in range(toy.n)] for _, _, z in terms])
    )
    region = torch.ones(1, toy.n, dtype=torch.bool)
    tokens = torch.zeros(1, m, toy.n, dtype=torch.long)
    return logps.unsqueeze(0), MaskedSamples(tokens, scored.unsqueeze(0), weight.unsqueeze(0), region)


@pytest.mark.parametrize("beta", [0.7, 1.0, 1.5, 3.0])
def test_our_estimators_equal_the_closed_forms(beta: float) -> None:
    for seed in range(3):
        toy = exact.make_toy(3, 3, 4, seed)
        for x in sequences(toy)[::5]:
            logps, samples = enumerated(toy, x)
            lower, upper = exact.elbo(toy, x), exact.eubo(toy, x, beta)
            assert float(ELBO("elbo_weight")(logps, samples).sum()) == pytest.approx(lower, abs=1e-6)
            assert float(EUBO(beta, "elbo_weight")(logps, samples).sum()) == pytest.approx(upper, abs=1e-6)
            mixed = Mixture(beta, 0.3, "elbo_weight")(logps, samples).sum()
            assert float(mixed) == pytest.approx(0.3 * upper + 0.7 * lower, abs=1e-6)
            loose = Loose(beta, "elbo_weight")(logps, samples).sum()
            inside = sum(
                q * w * toy.table[z][i, x[i]] ** beta
                for q, w, z in exact.token_terms(toy, x)
                for i in range(toy.n)
                if z[i] == exact.MASK
            )
            assert float(loose) == pytest.approx((inside - toy.n) / beta, abs=1e-6)


def test_continuous_time_weights_integrate_to_the_beta_function() -> None:
    """With w(t) = 1/t a mask of k of n tokens weighs B(k, n-k+1); per token these sum to 1."""
    for n in (1, 2, 3, 4):
        total = 0.0
        for hidden in itertools.product([0, 1], repeat=n - 1):
            k = sum(hidden) + 1  # the token itself is masked
            t = (np.arange(20000) + 0.5) / 20000
            total += float((t ** (k - 1) * (1 - t) ** (n - k)).mean())
        assert total == pytest.approx(1.0, abs=1e-6)


def test_beta_to_zero_gives_the_elbo() -> None:
    """A token's weights have mean 1 (it is revealed once), so the limit is the mean of log pi."""
    toy = exact.make_toy(3, 3, 4, seed=2)
    for x in sequences(toy)[::7]:
        logps, samples = enumerated(toy, x)
        assert samples.weight.mean(1) == pytest.approx(np.ones((1, 3)), abs=1e-9)
        lower = float(ELBO("elbo_weight")(logps, samples).sum())
        gaps = [float(EUBO(b, "elbo_weight")(logps, samples).sum()) - lower for b in (1e-2, 1e-3)]
        assert 0 < gaps[1] < gaps[0]
        assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.05)


def random_samples(m: int, seed: int, n: int = 6, batch: int = 4) -> tuple[Tensor, MaskedSamples]:
    g = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(batch, m, n, generator=g, dtype=torch.double)
    scored = torch.rand(batch, m, n, generator=g) < 0.6
    scored[:, :, 0] = True
    region = torch.ones(batch, n, dtype=torch.bool)
    weight = scored.double() * n / scored.sum(-1, keepdim=True)
    return logps, MaskedSamples(torch.zeros(batch, m, n, dtype=torch.long), scored, weight, region)


@pytest.mark.parametrize("normalization", ["per_token", "elbo_weight"])
def test_with_one_draw_the_gradients_of_both_bounds_are_parallel(normalization: str) -> None:
    logps, samples = random_samples(1, seed=0)
    gradients = []
    for estimator in (ELBO(normalization), EUBO(1.7, normalization)):
        leaf = logps.clone().requires_grad_()
        estimator(leaf, samples).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad[:, 0])
    for lower, upper in zip(*gradients, strict=True):
        ratio = upper[lower != 0] / lower[lower != 0]
        assert ratio.max() == pytest.approx(float(ratio.min()), rel=1e-9)
        assert ((lower != 0) == (upper != 0)).all()


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("normalization", ["per_token", "elbo_weight"])
def test_the_loose_bound_lies_above_the_eubo(beta: float, normalization: str) -> None:
    for seed in range(5):
        logps, samples = random_samples(3, seed)
        samples = MaskedSamples(samples.tokens, samples.scored, samples.weight, samples.scored.any(1))
        loose, tight = (e(logps, samples) for e in (Loose(beta, normalization), EUBO(beta, normalization)))
        assert (loose >= tight - 1e-12).all()
        assert (loose > tight + 1e-6).any()


def test_mixture_ends_and_middle() -> None:
    logps, samples = random_samples(2, seed=3)
    lower, upper = ELBO()(logps, samples), EUBO(1.5)(logps, samples)
    for omega in (0.0, 0.25, 1.0):
        expected = omega * upper + (1 - omega) * lower
        assert torch.allclose(Mixture(1.5, omega)(logps, samples), expected)


def test_zero_is_zero_and_has_no_gradient() -> None:
    logps, samples = random_samples(2, seed=4)
    parts = Zero()(logps.requires_grad_(), samples)
    assert not parts.requires_grad
    assert (parts == 0).all()


def test_per_token_elbo_times_length_is_the_weighted_elbo() -> None:
    logps, samples = random_samples(3, seed=5)
    per_token, weighted = ELBO()(logps, samples).sum(-1), ELBO("elbo_weight")(logps, samples).sum(-1)
    assert torch.allclose(per_token * samples.lengths, weighted)


def test_repeated_draws_change_nothing() -> None:
    logps, samples = random_samples(3, seed=6)

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)

    doubled = MaskedSamples(
        twice(samples.tokens), twice(samples.scored), twice(samples.weight), samples.region
    )
    estimators: list[LikelihoodEstimator] = [ELBO(), EUBO(2.0), Mixture(1.5, 0.4), Loose(1.5)]
    for estimator in estimators:
        assert torch.allclose(estimator(logps, samples), estimator(twice(logps), doubled))


def test_toy_example_of_two_tokens() -> None:
    """E.3: token 1 is predicted from MA with a, from MM with b, each with weight one half."""
    a, b, beta = 0.8, 0.3, 1.7
    logps = torch.tensor([[[a, 1.0], [b, 1.0]]], dtype=torch.double).log()
    scored = torch.tensor([[[True, False], [True, False]]])
    samples = MaskedSamples(
        torch.zeros(1, 2, 2, dtype=torch.long), scored, scored.double(), torch.ones(1, 2, dtype=torch.bool)
    )
    lower = float(ELBO("elbo_weight")(logps, samples).sum())
    upper = float(EUBO(beta, "elbo_weight")(logps, samples).sum())
    assert lower == pytest.approx(0.5 * (np.log(a) + np.log(b)), abs=1e-7)
    assert upper == pytest.approx(np.log((a**beta + b**beta) / 2) / beta, abs=1e-7)


def test_proposition_1_variance_is_a_quadratic_with_the_stated_minimiser() -> None:
    """Variance over all masks of ((1 - omega) w + omega rho) s, for tokens' own score s."""
    beta, tight = 1.5, 0
    for seed in range(6):
        toy = exact.make_toy(3, 2, 4, seed)
        logps, samples = enumerated(toy, (0, 1, 0))
        upper, lower = (
            torch.autograd.functional.jacobian(lambda leaf, e=e, s=samples: e(leaf, s).sum((0, 1)), logps)[0]
            for e in (EUBO(beta, "elbo_weight"), ELBO("elbo_weight"))
        )
        terms = [(q, w, z) for q, w, z in exact.token_terms(toy, (0, 1, 0)) if q > 0]
        steps = len(toy.reveal)
        q = np.array([q for q, _, _ in terms]) / steps  # time is uniform on T steps
        for i in range(3):
            hidden = samples.scored[0, :, i].numpy()
            w = steps * np.array([w for _, w, _ in terms]) * hidden
            pi = np.exp(logps[0, :, i].numpy())
            rho = w * pi**beta / (q * w * pi**beta).sum()
            # what the estimators hand back to the network is these weights times the probability
            assert lower[:, i].numpy() == pytest.approx(q * w, abs=1e-7)
            assert upper[:, i].numpy() == pytest.approx(q * rho, abs=1e-6)
            s = 1 / pi  # score of the token's probability itself: any fixed function of the mask serves

            def variance(omega: float, w=w, rho=rho, s=s, q=q) -> float:
                g = ((1 - omega) * w + omega * rho) * s
                return float((q * g**2).sum() - (q * g).sum() ** 2)

            def covariance(a: np.ndarray, b: np.ndarray, q=q) -> float:
                return float((q * a * b).sum() - (q * a).sum() * (q * b).sum())

            best = -covariance(w * s, (rho - w) * s) / covariance((rho - w) * s, (rho - w) * s)
            curve = np.polyfit([0.0, 0.5, 1.0], [variance(o) for o in (0.0, 0.5, 1.0)], 2)
            assert curve[0] > 0
            assert np.polyval(curve, 1.7) == pytest.approx(variance(1.7), rel=1e-6)
            assert -curve[1] / (2 * curve[0]) == pytest.approx(best, rel=1e-5)
            assert variance(best) <= min(variance(0.0), variance(1.0)) + 1e-12
            tight += variance(best) < 0.999 * min(variance(0.0), variance(1.0))
    assert tight > 0


def test_length_is_counted_once_on_either_scale() -> None:
    """Per token with length weighting equals sums without it, up to one factor for the whole batch."""
    g = torch.Generator().manual_seed(7)
    logps = -torch.rand(4, 2, 6, generator=g)
    region = torch.arange(6) < torch.tensor([[6], [4], [3], [5]])
    scored = region.unsqueeze(1) & (torch.rand(4, 2, 6, generator=g) < 0.7)
    scored[:, :, 0] = True
    weight = scored * region.sum(-1)[:, None, None] / scored.sum(-1, keepdim=True)
    samples = MaskedSamples(torch.zeros(4, 2, 6, dtype=torch.long), scored, weight, region)
    experience = experience_of(region, advantages=torch.tensor([1.0, -0.5, 0.3, -0.8]))
    batch = UpdateBatch.of(experience, samples)
    released = SPG(Sandwich(ELBO(), ELBO()), "batch")(logps, batch).loss
    sums = Sandwich(ELBO("elbo_weight"), ELBO("elbo_weight"))
    summed = SPG(sums, "batch", length_weighting=False)(logps, batch).loss
    assert float(released) * int(region.sum()) == pytest.approx(float(summed) * 4, rel=1e-5)


def test_counting_length_twice_is_refused() -> None:
    sums = Sandwich(ELBO("elbo_weight"), EUBO(1.5, "elbo_weight"))
    with pytest.raises(ValueError, match=r"length_weighting=false, or keep normalization=per_token"):
        SPG(sums)
    with pytest.raises(ValueError, match="give both the same"):
        Sandwich(ELBO("elbo_weight"), EUBO(1.5))
