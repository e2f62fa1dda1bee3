"""Correlated draws of a block's masks: what each draw keeps, what they share, and the memory of many."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import variance
from spg.algorithms.estimators import ELBO, Mixture, Sandwich
from spg.algorithms.masking import BlockAll, BlockRandom, Full, MaskingStrategy, Random
from spg.algorithms.objectives.spg import SPG
from spg.core.types import MaskedSamples, Rollout
from tests.helpers import rollout_of
from tests.unit.algorithms.test_invariance import batch
from tests.unit.algorithms.test_masking import MASK, same_distribution
from tests.unit.algorithms.test_masking import repeated as many_times
from tests.unit.models.test_lean import gradient, updating, wide

WAYS = ("antithetic", "stratified", "complementary")
DRAWS = 4000


def repeated(length: int, total: int) -> Rollout:
    """Return DRAWS equal completions of `length` tokens in `total` positions."""
    return many_times(length, total, 2).select(torch.arange(DRAWS))


def strategy(draws: str, num_mc: int, size: int = 4, **more: Any) -> BlockRandom:
    settings = {"prompt_mask_prob": 0.0, "block_choice": "uniform", "scored_positions": "block", **more}
    return BlockRandom(size, num_mc, draws=draws, **settings)


def blocks_and_counts(samples: MaskedSamples, size: int) -> tuple[Tensor, Tensor]:
    """Return the picked block and the number of its positions that are masked, each [B M]."""
    return samples.scored.float().argmax(-1) // size, samples.scored.sum(-1)


@pytest.mark.parametrize("num_mc", [2, 7, 16])
@pytest.mark.parametrize("draws", ["independent", "antithetic", "stratified"])
def test_each_draw_by_itself_is_what_an_independent_one_is(draws: str, num_mc: int) -> None:
    """Three blocks, the last of them shorter: block and number of masked positions of each draw."""
    sizes = (5, 5, 3)
    expected = {str(10 * b + c): 1 / 3 / k for b, k in enumerate(sizes) for c in range(1, k + 1)}
    block, count = blocks_and_counts(strategy(draws, num_mc, 5)(repeated(13, 16), MASK, 3), 5)
    for draw in {0, 1, num_mc // 2, num_mc - 1}:
        assert same_distribution(10 * block[:, draw] + count[:, draw], expected, math.inf)


@pytest.mark.parametrize("draws", WAYS)
def test_every_position_of_the_picked_block_is_masked_alike(draws: str) -> None:
    samples = strategy(draws, 4)(repeated(16, 16), MASK, 0)
    frequency = (samples.scored * (samples.weight * samples.scored.sum(-1, keepdim=True) / 16)).mean((0, 1))
    assert torch.allclose(frequency, torch.full((16,), 2.5 / 4 / 4), atol=0.025)


def test_antithetic_shares_add_up() -> None:
    """Blocks of equal size: what one draw of a pair masks of its block, the other leaves, and one more."""
    block, count = blocks_and_counts(strategy("antithetic", 7)(repeated(16, 16), MASK, 0), 4)
    assert (count[:, 0:6:2] + count[:, 1:6:2] == 5).all()
    assert (block[:, 0] != block[:, 1]).all(), "the blocks are those of independent draws"
    mixed = count[:, 0] + count[:, 2]
    assert len(mixed.unique()) == 7, "pairs are independent, and so is the draw that is left over"
    assert len((count[:, 0] + count[:, 6]).unique()) == 7


class Given:
    """A stream that gives these numbers."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = torch.tensor([numbers])

    def uniform(self, *shape: int) -> Tensor:
        """Return the numbers, of which there are as many as are asked for."""
        assert shape == (self.numbers.shape[1],)
        return self.numbers


def test_antithetic_shares_come_from_the_same_numbers() -> None:
    """At the ends of the range too: each of the 2**24 numbers has another one of them as its partner."""
    shares = strategy("antithetic", 8)._shares(torch.zeros(1, 8), Given([0.0, 0.25, 0.5, 1 - 2**-24]))  # type: ignore[arg-type]
    counts = (shares * 4).long() + 1
    assert counts.tolist() == [[1, 4, 2, 3, 3, 2, 4, 1]]
    assert shares.max() < 1


def test_strata_are_of_the_blocks_and_of_all_draws() -> None:
    rollout = repeated(16, 16)
    for rounds in (1, 2, 4):
        block, count = blocks_and_counts(strategy("stratified", 4 * rounds)(rollout, MASK, 0), 4)
        for number in range(4):
            own = count[block == number].view(DRAWS, rounds).sort(-1).values - 1
            assert torch.equal(own * rounds // 4, torch.arange(rounds).expand(DRAWS, -1))
        every = count.sort(-1).values - 1
        assert torch.equal(every, (torch.arange(4 * rounds) // rounds).expand(DRAWS, -1))
    order = count[:, 0]
    assert same_distribution(order, {str(c): 0.25 for c in range(1, 5)}, math.inf), "in random order"


@pytest.mark.parametrize("scored", ["block", "masked"])
def test_complementary_draws_share_out_a_block(scored: str) -> None:
    samples = strategy("complementary", 6, 5, scored_positions=scored)(repeated(13, 16), MASK, 3)
    positions = torch.arange(16)
    first, second = samples.scored[:, ::2], samples.scored[:, 1::2]
    empty = ~second.any(-1)
    picked = first.float().argmax(-1, keepdim=True) // 5
    other = torch.where(second.any(-1), second.float().argmax(-1), 99)
    picked = picked.minimum(other.unsqueeze(-1) // 5)
    inside = (positions // 5 == picked) & (positions < 13)
    assert not (first & second & inside).any()
    assert torch.equal((first | second) & inside, inside)
    later = (positions // 5 > picked) & (positions < 13)
    assert torch.equal(first & ~inside, later if scored == "masked" else later & False)
    assert torch.equal(second & ~inside, first & ~inside & ~empty.unsqueeze(-1))
    counts = (first & inside).sum(-1)
    assert torch.equal(empty, counts == inside.sum(-1)), "only a whole block leaves nothing"
    for pair, (b, k) in itertools.product(range(3), enumerate((5, 5, 3))):
        own = counts[:, pair][picked[:, pair, 0] == b]
        assert same_distribution(own, {str(c): 1 / k for c in range(1, k + 1)}, math.inf)
    logps = torch.full(samples.scored.shape, -1.0)
    constant = ELBO()(logps, samples).sum(-1)
    assert torch.allclose(constant, torch.full((DRAWS,), -1.0)), "what is constant has no variance"


def expectation(made: BlockRandom, length: int, size: int, logp: Callable[[Any], Tensor]) -> float:
    """Return the mean of the ELBO over all masks of the first draw, or pair: their weights as given here.

    The first draw's block is uniform, its count uniform on {1, ..., k}, its mask uniform among those.
    """
    samples = made(repeated(length, length), MASK, 0)
    masks = [tuple(row) for row in samples.scored[:, 0].tolist()]
    seen = {mask: row for row, mask in enumerate(masks)}
    blocks = [range(start, min(start + size, length)) for start in range(0, length, size)]
    total = weight = 0.0
    for mask, row in seen.items():
        block = next(b for b in blocks if any(mask[i] for i in b))
        k, count = len(block), sum(mask[i] for i in block)
        probability = 1 / (len(blocks) * k * math.comb(k, count))
        tokens = samples.tokens[row, :, 2:] == MASK
        values = torch.stack([logp(tuple(hidden)) for hidden in tokens.tolist()])
        total += probability * float((samples.weight[row].double() * values).sum(-1).mean())
        weight += probability
    assert weight == pytest.approx(1), "every mask was drawn"
    return total


@pytest.mark.parametrize("scored", ["block", "masked"])
def test_the_complementary_elbo_has_the_mean_of_independent_draws(scored: str) -> None:
    """Exactly, over all masks of blocks of 4 and 2 positions, for any log-probabilities."""
    g = torch.Generator().manual_seed(1)
    table = {m: -torch.rand(6, generator=g).double() for m in itertools.product((False, True), repeat=6)}
    found = [
        expectation(strategy(draws, num_mc, 4, scored_positions=scored), 6, 4, table.__getitem__)
        for draws, num_mc in (("independent", 1), ("complementary", 2))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("draws", WAYS)
def test_noise_and_many_draws(draws: str) -> None:
    """Earlier blocks are noisy and later ones masked, each block as often as others, however many draws."""
    rollout = repeated(16, 16).select(torch.arange(300))
    noisy = strategy(draws, 64, prompt_mask_prob=0.5)(rollout, MASK, 0)
    clean = strategy(draws, 64)(rollout, MASK, 0)
    assert torch.equal(noisy.scored, clean.scored)
    scores = clean.scored.any(-1)
    block, _ = blocks_and_counts(clean, 4)
    at, picked = torch.arange(16) // 4, block.unsqueeze(-1)
    masked = (noisy.tokens == MASK)[..., 2:]
    assert masked[(at > picked) & scores.unsqueeze(-1)].all()
    share = masked[(at < picked) & scores.unsqueeze(-1)].float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.01)
    if draws != "complementary":
        assert (torch.stack([(block == b).sum(-1) for b in range(4)]) == 16).all()


# of version 0.3
FINGERPRINT = "ecaf42fd915b0a2f"


def test_default_draws_are_those_of_earlier_versions() -> None:
    """A run of an earlier version goes on with the masks that it would have drawn."""
    g = torch.Generator().manual_seed(0)
    holes = torch.arange(14) < torch.randint(1, 15, (6, 1), generator=g)
    rollout = rollout_of(holes, prompt_mask=torch.arange(4) >= torch.randint(0, 4, (6, 1), generator=g))
    made: list[MaskingStrategy] = [Full(2), Random(3), Random(2, 0.5, "all"), BlockAll(3, 7)]
    made += [BlockRandom(3, 7), BlockRandom(4, 32, 0.3, "all", "uniform", "block"), BlockRandom(3, 2)]
    digest = hashlib.sha256()
    for seed, one in enumerate(made):
        samples = one(rollout, MASK, seed)
        for part in (samples.tokens, samples.scored, samples.weight):
            digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == FINGERPRINT


def test_empty_draws_are_not_computed_and_pieces_change_no_gradient() -> None:
    policy = wide()
    experience, _ = batch(1)
    samples = BlockRandom(4, 4, draws="complementary")(experience.rollout, policy.mask_id, 5)
    objective = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)))
    found = []
    for size in (None, 3):
        module = updating(policy, objective, size)
        pieces = module.gradient.split(module.prepare_batch(experience, samples))
        learned = objective.learns_from(experience)
        assert sum(len(piece.rows) for piece in pieces) == int(samples.scored.any(-1)[learned].sum())
        assert int((~samples.scored.any(-1)[learned]).sum()) > 0
        policy.zero_grad()
        loss = module.gradient.add(module.prepare_batch(experience, samples)).loss
        found.append((float(loss), gradient(policy)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5 * float(found[0][1].abs().max()))


def test_32_draws_in_pieces_keep_what_2_draws_keep() -> None:
    """Bytes held for the backward pass at any time, in pieces of as many sequences as one draw has."""
    objective = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)))
    peaks = {}
    for num_mc, size in ((2, 6), (32, 6), (32, None)):
        policy = wide()
        experience, _ = batch(1)
        samples = BlockRandom(4, num_mc)(experience.rollout, policy.mask_id, 0)
        held = {"now": 0, "most": 0}

        class Held:
            """A tensor kept for the backward pass, counted for as long as it is."""

            def __init__(self, tensor: Tensor, held: dict[str, int] = held) -> None:
                self.tensor, self.held = tensor, held
                held["now"] += tensor.nbytes
                held["most"] = max(held.values())

            def __del__(self) -> None:
                self.held["now"] -= self.tensor.nbytes

        module = updating(policy, objective, size)
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            module.gradient.add(module.prepare_batch(experience, samples))
        assert held["now"] == 0
        peaks[num_mc, size] = held["most"]
    # the pieces hold other numbers of scored positions, and there are a few more tensors [B M T]
    assert peaks[32, 6] < 1.25 * peaks[2, 6]
    assert peaks[32, None] > 8 * peaks[2, 6]


@pytest.mark.long
def test_a_small_run_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "variance.json"
    words = "--tasks sudoku --draws 4 --sequences 2 --repeats 5 --gradients 3 --output"
    monkeypatch.setattr("sys.argv", ["variance", *words.split(), str(output)])
    variance.main()
    rows = json.loads(output.read_text())["tasks"]["sudoku"]["draws"]["4"]
    assert list(rows) == list(variance.WAYS)
    for figure in variance.FIGURES:
        assert rows["independent"][figure]["relative"] == pytest.approx(1)
        for row in rows.values():
            low, high = row[figure]["interval"]
            assert 0 < low <= row[figure]["relative"] <= high
    assert rows["independent"]["passes"] == rows["stratified"]["passes"] == 4
    assert 2 <= rows["complementary"]["passes"] < 4


def test_variances_are_those_of_the_sums() -> None:
    g = torch.Generator().manual_seed(0)
    elbo, eubo, slope = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g), torch.randn(6, 9)
    found = variance.variances(variance.Measurement(elbo, eubo, slope, 2.0))
    for name, values in (("elbo", elbo), ("eubo", eubo), ("gradient", slope)):
        assert float(found[name].mean()) == pytest.approx(float(values.var(0).sum()), rel=1e-5)
    less = variance.make_row(
        variance.Measurement(elbo / 2, eubo, slope, 1.0), variance.Measurement(elbo, eubo, slope, 2.0)
    )
    assert less["elbo"]["relative"] == pytest.approx(1 / 8)
    assert less["gradient"]["relative"] == pytest.approx(1 / 2)
