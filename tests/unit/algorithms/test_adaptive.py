"""omega=auto: what it learns against exact enumeration, when it learns it, and how a run carries it on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spg import config
from spg.algorithms.estimators import ELBO, EUBO, AdaptiveOmega, Mixture, Sandwich, optimum, variance
from spg.algorithms.objectives import SPG, ObjectiveResult
from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.errors import Interrupted
from spg.core.files import read_csv
from spg.core.types import Cohort, Experience, MaskedSamples, UpdateBatch
from spg.reports.dynamics import plot_comparison, read_series
from spg.reports.plots import plot_sweep
from spg.reports.points import best, points
from spg.runs import multirun as sweeps
from tests import faults
from tests.helpers import experience_of, same_run, train_here
from tests.unit.reports.sweeps import make_job, make_sweep

N = 3  # tokens of the toys
# every mask of them with its probability: a uniform number of tokens, then which ones
MASKS = [mask for mask in itertools.product((False, True), repeat=N) if any(mask)]
CHANCES = [1 / (N * math.comb(N, sum(mask))) for mask in MASKS]
Parts = Callable[[Tensor], Tensor]  # parameters -> log-probabilities [masks N]


def one_logit_a_token(seed: int, sharp: float = 1.5) -> tuple[Tensor, Parts]:
    """Return parameters and a policy of two symbols: a logit is its token's parameter plus a fixed number."""
    g = torch.Generator().manual_seed(seed)
    own, rest = (sharp * torch.randn(*shape, generator=g).double() for shape in ((N,), (len(MASKS), N)))
    return own, lambda theta: torch.nn.functional.logsigmoid(theta + rest)


def softmax_of_features(seed: int, sharp: float = 1.0) -> tuple[Tensor, Parts]:
    """Return parameters and a softmax policy of three symbols: one matrix for all tokens and masks."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(len(MASKS), N, 4, generator=g).double()
    features = features + 1.5 * torch.randn(1, N, 4, generator=g).double()  # what a token has in all masks
    matrix = sharp * torch.randn(4, 3, generator=g).double()
    symbols = torch.tensor([0, 1, 0])
    return matrix, lambda theta: (features @ theta).log_softmax(-1)[:, torch.arange(N), symbols]


def sets_of_draws(draws: int) -> tuple[Tensor, Tensor]:
    """Return all ordered choices of `draws` masks [Q M] and their probabilities [Q]."""
    sets = torch.tensor(list(itertools.product(range(len(MASKS)), repeat=draws)))
    return sets, torch.tensor(CHANCES).double()[sets].prod(-1)


def samples_of(sets: Tensor) -> MaskedSamples:
    """Return samples whose draws are the masks at `sets` [Q M]."""
    scored = torch.tensor(MASKS)[sets]
    weight = scored.double() * N / scored.sum(-1, keepdim=True)
    return MaskedSamples(
        torch.zeros(*sets.shape, N, dtype=torch.long),
        scored,
        weight,
        torch.ones(len(sets), N, dtype=torch.bool),
    )


def true_moments(theta: Tensor, policy: Parts, draws: int, beta: float, scale: str) -> tuple[float, ...]:
    """Return Var(l), Cov(l, u), Var(u) of the gradients by the parameters, over all sets of draws."""
    sets, chances = sets_of_draws(draws)
    samples = samples_of(sets)

    def bounds(leaf: Tensor) -> Tensor:
        logps = policy(leaf)[sets]
        return torch.stack([e(logps, samples).sum(-1) for e in (ELBO(scale), EUBO(beta, scale))])

    gradients = torch.autograd.functional.jacobian(bounds, theta, vectorize=True).flatten(2)
    centred = gradients - (chances[:, None] * gradients).sum(1, keepdim=True)
    lower, upper = centred
    return tuple(
        float((chances[:, None] * a * b).sum()) for a, b in ((lower, lower), (lower, upper), (upper, upper))
    )


def learned(
    theta: Tensor, policy: Parts, draws: int, beta: float, scale: str
) -> tuple[AdaptiveOmega, dict[str, float]]:
    """Return what is learned from all pairs of sets of draws, each with its probability."""
    sets, chances = sets_of_draws(draws)
    first, second = (
        i.flatten() for i in torch.meshgrid(torch.arange(len(sets)), torch.arange(len(sets)), indexing="ij")
    )
    omega = Mixture(beta, "auto", scale).adaptive
    assert omega is not None
    advantages, weight = -torch.ones(len(first)), (chances[first] * chances[second]).sqrt()
    logps = policy(theta)
    for order in (first, second):
        told = omega.figures(logps[sets[order]], samples_of(sets[order]), advantages, weight)
    return omega, omega.adapt({name: float(figure.sum()) for name, figure in told.items()})


@pytest.mark.parametrize("scale", ["per_token", "elbo_weight"])
def test_it_is_exact_where_scores_point_the_same_way(scale: str) -> None:
    """Proposition 1's formula on the gradients that an update takes, by all sets of two masks."""
    for seed in range(4):
        toy = one_logit_a_token(seed)
        moments = true_moments(*toy, 2, 1.5, scale)
        omega, told = learned(*toy, 2, 1.5, scale)
        best = optimum(*moments)
        assert best is not None
        assert told["/optimum"] == pytest.approx(best, abs=1e-6)
        assert omega.value == pytest.approx(min(best, 1.0), abs=1e-6)
        for name, share in (("lower", 0.0), ("used", 0.5), ("upper", 1.0)):
            assert told[f"/variance_{name}"] == pytest.approx(variance(share, *moments), rel=1e-6)
        ends = min(variance(0.0, *moments), variance(1.0, *moments))
        assert variance(best, *moments) <= ends + 1e-12
        assert variance(best, *moments) < variance(best + 0.01, *moments)
        assert variance(best, *moments) < variance(best - 0.01, *moments)


def test_sampled_draws_find_it_too() -> None:
    theta, policy = one_logit_a_token(2)
    g = torch.Generator().manual_seed(0)
    chances = torch.tensor(CHANCES).double()
    draws = 3
    sets = torch.multinomial(chances, 2 * 4000 * draws, replacement=True, generator=g).view(2, 4000, draws)
    omega = Mixture(1.5, "auto").adaptive
    assert omega is not None
    advantages = torch.full((4000,), -1.0)
    for order in sets:
        told = omega.figures(policy(theta)[order], samples_of(order), advantages, -advantages)
    omega.adapt({name: float(figure.mean()) for name, figure in told.items()})
    best = optimum(*true_moments(theta, policy, draws, 1.5, "per_token"))
    assert omega.value == pytest.approx(best, abs=0.03)


def test_the_optimum_is_clipped_at_either_end() -> None:
    toy = one_logit_a_token(0)
    best = optimum(*true_moments(*toy, 2, 1.5, "elbo_weight"))
    assert best is not None
    assert best > 1.01
    assert learned(*toy, 2, 1.5, "elbo_weight")[0].value == 1.0
    # with the bounds' roles exchanged it is 1 - best, below 0
    omega = AdaptiveOmega(EUBO(1.5, "elbo_weight"), ELBO("elbo_weight"), smoothing=0.0)
    sets, chances = sets_of_draws(2)
    all_pairs = torch.cartesian_prod(torch.arange(len(sets)), torch.arange(len(sets)))
    weight, advantages = chances[all_pairs].prod(-1).sqrt(), -torch.ones(len(all_pairs))
    for order in all_pairs.unbind(-1):
        told = omega.figures(toy[1](toy[0])[sets[order]], samples_of(sets[order]), advantages, weight)
    assert omega.adapt({name: float(f.sum()) for name, f in told.items()})["/optimum"] == pytest.approx(
        1 - best
    )
    assert omega.value == 0.0


def test_where_directions_differ_it_is_an_approximation() -> None:
    """One softmax matrix for all tokens: off by 0.16 on average, 0.54 at worst, for 18% more variance."""
    errors, excess = [], []
    for seed in range(8):
        toy = softmax_of_features(seed)
        moments = true_moments(*toy, 2, 1.5, "per_token")
        best = optimum(*moments)
        assert best is not None
        value, best = learned(*toy, 2, 1.5, "per_token")[0].value, min(max(best, 0.0), 1.0)
        errors.append(abs(value - best))
        excess.append(variance(value, *moments) / variance(best, *moments) - 1)
        assert variance(value, *moments) <= max(variance(0.0, *moments), variance(1.0, *moments))
    assert sum(errors) / 8 == pytest.approx(0.16, abs=0.02)
    assert max(errors) == pytest.approx(0.54, abs=0.02)
    assert sum(excess) / 8 < 0.05
    assert max(excess) == pytest.approx(0.18, abs=0.01)


def update_of(seed: int, draws: int = 2) -> tuple[Tensor, MaskedSamples]:
    """Return log-probabilities [6 M 5] and samples of some masks."""
    g = torch.Generator().manual_seed(seed)
    scored = torch.rand(6, draws, 5, generator=g) < 0.6
    weight = scored * 5 / scored.sum(-1, keepdim=True).clamp_min(1)
    tokens, region = torch.zeros(6, draws, 8, dtype=torch.long), torch.ones(6, 5, dtype=torch.bool)
    return -3 * torch.rand(scored.shape, generator=g) * scored, MaskedSamples(tokens, scored, weight, region)


def experience(groups: tuple[int, ...] = (0, 0, 0, 1, 1, 1)) -> Experience:
    """Return six sequences in two groups, three of them negative traces."""
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.4, 0.0, -0.4])
    return experience_of(torch.ones(6, 5, dtype=torch.bool), advantages, group=torch.tensor(groups))


def outcome(objective: SPG, seed: int, seen: Experience) -> ObjectiveResult:
    """Return loss and figures of an update under the masks of `seed`."""
    logps, samples = update_of(seed)
    return objective(logps, UpdateBatch.of(seen, samples))


def means(objective: SPG, seen: Experience, *seeds: int) -> dict[str, float]:
    """Return the means of the figures of the last of some updates on one rollout, as training takes them."""
    for seed in seeds:
        figures = outcome(objective, seed, seen).figures
    learned = objective.learns_from(seen)
    return {name: float((figure * learned).sum() / learned.sum()) for name, figure in figures.items()}


def auto(positive: Any = None) -> SPG:
    return SPG(Sandwich(positive or ELBO(), Mixture(1.5, "auto")))


def test_an_update_uses_what_earlier_ones_told_and_nothing_of_itself() -> None:
    objective, seen = auto(), experience()
    first = objective.adapt(means(objective, seen, 1))
    assert first["omega"] == 0.5
    assert not any(name.startswith("omega/") for name in first), "one set of draws can't be compared"
    for seed, used in ((2, 0.5), (3, None)):
        negative = objective.sandwich.negative
        before = negative.omega
        loss = outcome(objective, seed, seen).loss
        fixed = outcome(SPG(Sandwich(ELBO(), Mixture(1.5, before))), seed, seen).loss
        assert torch.equal(loss, fixed)
        assert negative.omega == before, "until the update's step is taken"
        told = objective.adapt(means(objective, seen, seed - 1, seed))
        assert told["omega"] == before == (before if used is None else used)
        assert negative.omega != before
        assert set(told) > {f"omega/{n}" for n in ("optimum", "spread")}
        assert told["omega/variance_used"] >= variance_at_least(told) - 1e-12


def variance_at_least(told: dict[str, float]) -> float:
    """Return the least variance of the parabola that the metrics of an update describe."""
    low, high, best = told["omega/variance_lower"], told["omega/variance_upper"], told["omega/optimum"]
    # low - k best^2 = high - k (1 - best)^2
    return low - (low - high) / (best**2 - (1 - best) ** 2) * best**2


def test_omega_follows_the_smoothed_variances() -> None:
    omega = AdaptiveOmega(ELBO(), EUBO(1.5), smoothing=0.75)
    moments = [(1.0, 0.4, 0.6), (2.0, 1.9, 3.0), (1.0, 1.2, 3.0)]
    sums = [0.0, 0.0, 0.0]
    for new in moments:
        told = omega.adapt({**dict(zip(("lower", "cross", "upper"), new, strict=True)), **OTHERS})
        assert told["/optimum"] == pytest.approx((new[0] - new[1]) / (new[0] - 2 * new[1] + new[2]))
        sums = [0.75 * a + 0.25 * b for a, b in zip(sums, new, strict=True)]
        assert omega.value == pytest.approx((sums[0] - sums[1]) / (sums[0] - 2 * sums[1] + sums[2]))
    assert told["/spread"] == pytest.approx(0.3)
    assert omega.adapt({}) == {"": omega.value}, "a rollout's first update, or one without negative traces"


# of half of an update's sequences, with optima of mean 0.5 and standard deviation 0.3
OTHERS = {"known": 0.5, "best": 0.25, "best_squared": 0.5 * (0.5**2 + 0.3**2)}


def test_draws_of_another_rollout_are_not_compared() -> None:
    objective, seen = auto(), experience()
    means(objective, seen, 1)
    assert "omega/known" not in means(objective, experience(), 2)
    shorter = replace(seen, rollout=seen.rollout.truncate(5))  # as an update with cut completions gets it
    means(objective, seen, 1)
    assert "omega/known" in means(objective, shorter, 2)


def test_only_negative_traces_count_by_their_share_of_the_loss() -> None:
    objective, seen = auto(), experience()
    for seed in (1, 2):
        figures = outcome(objective, seed, seen).figures
    assert (figures["omega/known"] > 0).tolist() == [False, True, True, False, False, True]
    twice = auto()
    doubled = replace(seen, advantages=2 * seen.advantages)
    for seed in (1, 2):
        other = outcome(twice, seed, doubled).figures
    assert torch.allclose(other["omega/lower"], 4 * figures["omega/lower"])
    assert torch.allclose(other["omega/best"], figures["omega/best"])
    alone = SPG(Sandwich(ELBO(), Mixture(1.5, "auto")), "batch")
    apart = replace(seen, rollout=replace(seen.rollout, group=torch.tensor([0, 0, 0, 0, 0, 1])))
    for objective in (twice, alone):
        for seed in (1, 2):
            other = outcome(objective, seed, apart).figures
        share = objective.coefficients(torch.full((6,), 5), apart.rollout.group) / (1 / 6)
        assert torch.allclose(other["omega/lower"], share.square() * figures["omega/lower"], rtol=1e-5)


def test_positive_traces_have_an_omega_of_their_own() -> None:
    objective, seen = auto(Mixture(1.5, "auto")), experience()
    told = objective.adapt(means(objective, seen, 1, 2))
    assert told["omega"] == told["positive/omega"] == 0.5
    assert told["omega/optimum"] != told["positive/omega/optimum"]
    assert set(objective.state()) == {"omega", "positive/omega"}
    alone = auto()
    assert alone.adapt(means(alone, seen, 1, 2))["omega/optimum"] == told["omega/optimum"]


def test_figures_are_those_of_one_process() -> None:
    whole, seen = auto(), experience()
    parts = [(slice(0, 3), auto(), seen.advantages[:3]), (slice(3, 6), auto(), seen.advantages[3:])]
    for seed in (1, 2):
        expected = outcome(whole, seed, seen).figures
        found = []
        for own, objective, advantages in parts:
            rows = torch.arange(6)[own]
            logps, samples = update_of(seed)
            cohort = replace(Cohort.of(seen, samples), own=own)
            mine = replace(seen.select(rows), advantages=advantages)  # one tensor for all updates
            batch = UpdateBatch(mine, samples.select(rows), cohort)
            found.append(objective(logps[rows], batch).figures)
    for name in expected:
        assert torch.allclose(torch.cat([figures[name] for figures in found]), expected[name]), name


def test_a_number_learns_nothing_and_logs_nothing() -> None:
    objective, seen = SPG(Sandwich(ELBO(), Mixture(1.5, 0.3))), experience()
    figures = means(objective, seen, 1, 2)
    assert not any("omega" in name for name in figures)
    assert objective.adapt(figures) == figures
    assert objective.state() == {}


def test_what_was_learned_is_in_the_state() -> None:
    objective, seen = auto(), experience()
    objective.adapt(means(objective, seen, 1, 2))
    again = auto()
    again.restore(objective.state())
    assert again.sandwich.negative.omega == objective.sandwich.negative.omega != 0.5
    again.restore({})
    assert again.sandwich.negative.omega == 0.5


@pytest.mark.long
def test_a_resumed_run_goes_on_with_its_omega(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = (
        "omega=auto",
        "trainer.max_updates=8",
        "trainer.prompts_per_rollout=4",
        "trainer.samples_every=0",
    )
    whole = train_here(tmp_path / "whole", *short)
    with monkeypatch.context() as patch:
        faults.interrupted("4", patch.setattr)
        with pytest.raises(Interrupted):
            train_here(tmp_path / "stopped", *short)
    path = tmp_path / "stopped/checkpoints/last.ckpt"
    checkpoint = torch.load(path)
    assert all(moment != 0 for moment in checkpoint["spg"]["objective"]["omega"])
    resume(str(tmp_path / "stopped"), [])
    assert same_run(whole, tmp_path / "stopped")
    rows = read_csv(whole / "metrics.csv")
    used = [float(row["omega"]) for row in rows if row["omega"]]
    assert len(used) == 8
    assert used[:2] == [0.5, 0.5]
    assert len(set(used)) >= 6
    assert [bool(row["omega/optimum"]) for row in rows if row["omega"]] == 2 * [False, True, True, True]


def test_it_is_refused_where_it_could_learn_nothing() -> None:
    for key in ("num_mc", "mu"):
        words = f"omega=auto with {key}=1.*set {key}=2 or more, or omega to a number"
        with pytest.raises(ConfigError, match=words):
            config.compose("config", ["omega=auto", f"{key}=1"])
        config.compose("config", ["algorithm=d1", "omega=auto", f"{key}=1"])  # which reads no omega
    for method in ("wd1", "espo"):  # whatever num_mc is
        with pytest.raises(ConfigError, match="learned by SPG's objective alone"):
            config.compose("config", [f"algorithm={method}", "estimator=mixture", "omega=auto"])
    with pytest.raises(ConfigError, match="masking=trajectory has the same in all"):
        config.compose("config", ["masking=trajectory", "omega=auto"])
    words = "a number from 0 to 1, or auto"
    for value in ("often", 1.5):
        with pytest.raises(ValueError, match=words):
            Mixture(1.5, value)


def test_numbers_and_auto_are_swept_together(tmp_path: Path) -> None:
    config.preflight("config", ["--multirun", "omega=0,0.5,1,auto", "seed=1,2"])
    folder = make_sweep(tmp_path / "omega", ["omega", "seed"])
    for share in ("auto", 1, 0.5, 0):
        for seed in (1, 2):
            summary = {"accuracy.after": 0.5 + 0.1 * seed, "validation.best": 0.9 if share == "auto" else 0.5}
            make_job(folder, f"{share}-{seed}", {"omega": share, "seed": seed}, **summary)
    rows = sweeps.read_rows(folder)
    assert [row["omega"] for row in rows[::2]] == [0, 0.5, 1, "auto"]
    averages = points(rows, ["omega", "seed"], "accuracy")
    assert best(averages) is averages[3]
    plot_sweep(averages, "accuracy", "omega", tmp_path / "bars.png")
    series = read_series(sweeps.read_jobs(folder), ["omega", "seed"], "reward")
    plot_comparison(series, "omega", tmp_path / "reward.png", "reward", 4)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("bars.png", "reward.png"))
