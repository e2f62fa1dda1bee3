"""Masking strategies: statistics of the authors' code, templates, and what must always hold."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spg.estimators import ELBO, Mixture, Sandwich
from spg.masking import BlockAll, BlockRandom, Full, MaskingStrategy, Random
from spg.objectives.spg import SPG
from spg.types import Experience, MaskedSamples, Rollout
from tests.helpers import GOLDEN, rollout_of

REFERENCE = json.loads((GOLDEN / "spg_loss" / "forward_process_distribution.json").read_text())
MASK = 2
DRAWS = 20000


def strategy_of(args: dict[str, Any], **more: Any) -> MaskingStrategy:
    probability = args["p_mask_prompt"] if args["use_mask_prompt"] else 0.0
    common = {"num_mc": args["num_t"], "prompt_mask_prob": probability, **more}
    made = {"block_random": BlockRandom, "block_all": BlockAll, "random": Random, "all": Full}
    blocks = {"block_size": args["block_length"]} if "block" in args["forward_type"] else {}
    return made[args["forward_type"]](**blocks, **common)


def repeated(length: int, total: int, prompt: int) -> Rollout:
    """Return DRAWS equal completions of `length` tokens in `total` positions."""
    holes = (torch.arange(total) < length).expand(DRAWS, total)
    return rollout_of(holes, prompt_mask=torch.ones(DRAWS, prompt, dtype=torch.bool))


def close(ours: float, expected: float, draws: float, mine: float = DRAWS) -> bool:
    """Return whether two frequencies, of `mine` and `draws` trials, agree to five standard errors."""
    variance = max(expected * (1 - expected), 1e-4)
    return abs(ours - expected) <= 5 * (variance * (1 / draws + 1 / mine)) ** 0.5


def same_distribution(values: Tensor, expected: dict[str, float], draws: float) -> bool:
    """Return whether whole numbers [N] occur as often as {number: frequency} says, and no others."""
    seen = {str(v): float((values == v).float().mean()) for v in values.unique().tolist()}
    names = seen.keys() | expected.keys()
    return all(close(seen.get(n, 0), expected.get(n, 0), draws, len(values)) for n in names)


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("setting", list(REFERENCE))
def test_frequencies_are_those_of_the_reference(setting: str, row: int) -> None:
    reference = REFERENCE[setting]
    args, expected = reference["args"], reference["rows"][row]
    prompt, total, size = reference["prompt_len"], reference["completion_len"], args["block_length"]
    length, draws = expected["length"], expected["n_draws"]
    inside = torch.arange(total) < length
    rollout = repeated(length, total, prompt)
    samples = strategy_of(args)(rollout, MASK, 1)
    masked = (samples.tokens == MASK)[:, :, prompt:]
    assert torch.equal(samples.scored, masked & inside)
    assert same_distribution(samples.scored.sum(-1).flatten(), expected["n_masked_before_eos"], draws)
    fraction = float((samples.tokens[:, :, :prompt] == MASK).float().mean())
    assert close(fraction, expected["prompt_mask_fraction"], draws * prompt)
    if length < total:
        assert masked[:, :, length:].float().mean() == expected["after_eos_mask_fraction"] == 1
    if "block" not in args["forward_type"]:
        return
    # the same draws without noise in the clean blocks: the picked one is the first with a mask
    clean = strategy_of(args, prompt_mask_prob=0.0)
    plain = clean(rollout, MASK, 1).scored
    assert not (plain & ~samples.scored).any()
    block = torch.arange(total) // size
    picked = block[plain.float().argmax(-1)]
    for m, frequencies in enumerate(expected["block_freq_per_t"]):
        assert same_distribution(picked[:, m], frequencies, draws)
    if args["num_t"] == 2:
        by_pair = expected["block_pair_freq"]  # "[3, 0]": frequency
        pairs = {str(int(pair[1] + pair[4])): frequency for pair, frequency in by_pair.items()}
        assert same_distribution(10 * picked[:, 0] + picked[:, 1], pairs, draws)
    here = inside & (block == picked.unsqueeze(-1))
    widths, counts = here.sum(-1), (samples.scored & here).sum(-1)
    for width, frequencies in expected["n_masked_in_chosen_block"].items():
        values = counts[widths == int(width)]
        assert same_distribution(values, frequencies, len(values) * draws / DRAWS)
    parts = {
        "in_block": here,
        "earlier": inside & (block < picked.unsqueeze(-1)),
        "later": inside & (block > picked.unsqueeze(-1)),
    }
    scored = int(samples.scored.sum())
    for name, share in expected["loss_tokens_share"].items():
        # tokens of a sequence are scored together: far fewer independent trials than tokens
        assert close(int((samples.scored & parts[name]).sum()) / scored, share, draws)
    fractions = {
        "earlier": expected["earlier_block_mask_fraction"],
        "later": expected["later_block_mask_fraction_before_eos"],
    }
    for name, fraction in fractions.items():
        values = samples.scored[parts[name]].float()
        assert (fraction is None) == (len(values) == 0)
        if fraction is not None:
            assert close(float(values.mean()), fraction, len(values) * draws / DRAWS, len(values))


def test_every_position_of_the_picked_block_is_masked_alike() -> None:
    samples = BlockRandom(4, 1, 0.0, scored_positions="block")(repeated(16, 16, 2), MASK, 0)
    frequency = samples.scored.float().mean((0, 1))
    assert torch.allclose(frequency, torch.full((16,), 2.5 / 4 / 4), atol=0.015)


def picked_blocks(strategy: MaskingStrategy, rollout: Rollout, size: int, seed: int = 0) -> Tensor:
    """Return the first block [B M] that holds a scored position."""
    samples = strategy(rollout, MASK, seed)
    return samples.scored.float().argmax(-1) // size


def test_uniform_choice_is_uniform_where_the_released_one_is_not() -> None:
    rollout = repeated(12, 16, 2)
    uniform = picked_blocks(BlockAll(4, 1, 0.0, block_choice="uniform"), rollout, 4)
    released = picked_blocks(BlockAll(4, 1, 0.0, block_choice="released"), rollout, 4)
    assert torch.allclose(uniform[:, 0].bincount() / DRAWS, torch.full((3,), 1 / 3), atol=0.02)
    assert torch.allclose(released[:, 0].bincount() / DRAWS, torch.tensor([0.5, 0.25, 0.25]), atol=0.02)


def test_more_draws_than_blocks_go_round() -> None:
    """Uniform choice: every round of E draws holds each of the E eligible blocks once."""
    rollout = repeated(12, 16, 2)
    picked = picked_blocks(BlockAll(4, 7, 0.0, block_choice="uniform"), rollout, 4)
    for start in (0, 3):
        assert torch.equal(picked[:, start : start + 3].sort(-1).values, torch.arange(3).expand(DRAWS, 3))
    released = picked_blocks(BlockAll(4, 8, 0.0), repeated(16, 16, 2), 4)
    for start in (0, 4):
        assert torch.equal(released[:, start : start + 4].sort(-1).values, torch.arange(4).expand(DRAWS, 4))
    for rounds, size in ((picked, 3), (released, 4)):
        repeats = (rounds[:, :size] == rounds[:, size : 2 * size]).all(-1).float().mean()
        assert float(repeats) == pytest.approx(1 / math.factorial(size), abs=0.01), "each round is fresh"


def test_released_rounds_where_the_completion_ends_early() -> None:
    """Four blocks, three of them eligible: block 0 stands for the fourth in every round."""
    picked = picked_blocks(BlockAll(4, 8, 0.0), repeated(12, 16, 2), 4)
    for start in (0, 4):
        one_round = picked[:, start : start + 4].sort(-1).values
        assert torch.equal(one_round, torch.tensor([0, 0, 1, 2]).expand(DRAWS, 4))
    assert (picked[:, :4] != picked[:, 4:]).any()


def test_scored_positions_of_the_picked_block_only() -> None:
    rollout = repeated(16, 16, 2)
    samples = BlockRandom(4, 2, 0.15, scored_positions="block")(rollout, MASK, 0)
    blocks = torch.arange(16) // 4
    first, last = samples.scored.float().argmax(-1), 15 - samples.scored.flip(-1).float().argmax(-1)
    assert torch.equal(blocks[first], blocks[last])
    assert (samples.scored.sum(-1) >= 1).all()
    completion = (samples.tokens == MASK)[:, :, 2:]
    assert (completion & (blocks > blocks[first].unsqueeze(-1))).sum() == 4 * (3 - blocks[first]).sum()


def test_region_all_scores_what_follows_eos() -> None:
    samples = Full(1, 0.0, region="all")(repeated(5, 16, 2), MASK, 0)
    assert bool(samples.scored.all())
    assert int(samples.lengths[0]) == 16


def test_block_without_holes_is_never_picked() -> None:
    """Blocks of 4: the first wholly given, the second with one hole, the third free."""
    given_tokens = torch.tensor([[True] * 4 + [True, False, True, True] + [False] * 4]).expand(500, 12)
    rollout = rollout_of(
        ~given_tokens, given=given_tokens, completion_mask=torch.ones(500, 12, dtype=torch.bool)
    )
    for choice in ("released", "uniform"):
        picked = picked_blocks(BlockAll(4, 3, 0.0, block_choice=choice), rollout, 4)
        assert set(picked.flatten().tolist()) == {1, 2}


def test_sequence_without_holes_is_left_alone() -> None:
    holes = torch.zeros(2, 8, dtype=torch.bool)
    rollout = rollout_of(holes, given=~holes, completion_mask=~holes)
    experience = Experience(rollout, torch.ones(2), {}, torch.tensor([1.0, -1.0]))
    for strategy in (Full(2), Random(2), BlockRandom(4, 2), BlockAll(4, 2, block_choice="uniform")):
        samples = strategy(rollout, MASK, 0)
        assert not samples.scored.any()
        assert not samples.weight.any()
        logps = torch.full((2, 2, 8), -1.0, requires_grad=True)
        loss, _ = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)))(logps, samples, experience)
        loss.backward()
        assert loss.item() == 0
        assert logps.grad is not None
        assert not logps.grad.any(), "nor NaN"


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Rollouts with left padding, templates and early ends."""
    b, t = draw(st.integers(1, 5)), draw(st.integers(1, 14))
    seed = draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    given_tokens = torch.rand(b, t, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    ends = torch.randint(1, t + 1, (b, 1), generator=g)
    completion_mask = torch.arange(t) < ends
    pads = torch.randint(0, 4, (b, 1), generator=g)
    return rollout_of(
        completion_mask & ~given_tokens,
        given=given_tokens,
        completion_mask=completion_mask,
        prompt_mask=torch.arange(4) >= pads,
    )


STRATEGIES = [
    Full(2),
    Random(3),
    Random(2, region="all"),
    BlockRandom(3, 2),
    BlockRandom(4, 5, 0.5, block_choice="uniform"),
    BlockRandom(3, 2, scored_positions="block"),
    BlockAll(2, 3, 0.9),
    BlockRandom(100, 2, 1.0, region="all"),
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rollouts(), st.sampled_from(STRATEGIES), st.integers(0, 1000))
def test_what_always_holds(rollout: Rollout, strategy: MaskingStrategy, seed: int) -> None:
    samples: MaskedSamples = strategy(rollout, MASK, seed)
    prompt = rollout.prompt_ids.shape[1]
    masked = samples.tokens == MASK
    completion = masked[:, :, prompt:]
    assert not (samples.scored & ~completion).any(), "scored positions are masked"
    assert not (samples.scored & ~samples.region.unsqueeze(1)).any(), "and in the region"
    assert not (completion & rollout.given.unsqueeze(1)).any(), "given tokens are not masked"
    assert not (samples.region & rollout.given).any(), "nor ever scored"
    assert not (masked[:, :, :prompt] & ~rollout.prompt_mask.unsqueeze(1)).any(), "nor is padding masked"
    unmasked = torch.cat([rollout.prompt_ids, rollout.completion_ids], -1).unsqueeze(1)
    assert torch.equal(torch.where(masked, unmasked, samples.tokens), unmasked.expand_as(samples.tokens))
    has_holes = samples.region.any(-1)
    assert torch.equal(samples.scored.any(-1).all(-1), has_holes), "every draw scores something"
    counts = samples.scored.sum(-1, keepdim=True).clamp_min(1)
    assert torch.allclose(samples.weight, samples.scored * samples.lengths[:, None, None] / counts)


def test_limits() -> None:
    with pytest.raises(ValueError, match=r"prompt_mask_prob=1\.5 .* allowed: a number from 0 to 1"):
        Random(prompt_mask_prob=1.5)
    with pytest.raises(ValueError, match=r"block_size=0 .* allowed: a whole number, 1 or more"):
        BlockRandom(0)
    with pytest.raises(ValueError, match=r"num_mc=2\.5 .* allowed: a whole number, 1 or more"):
        Full(num_mc=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_choice='fair'"):
        BlockRandom(4, block_choice="fair")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rollouts(), st.sampled_from(STRATEGIES), st.integers(0, 1000), st.integers(1, 3))
def test_neighbours_and_padding_change_no_draw(
    rollout: Rollout, strategy: MaskingStrategy, seed: int, extra: int
) -> None:
    """What lets several processes, each with its own groups, draw the masks of one with all of them."""
    whole = strategy(rollout, MASK, seed)
    rows = torch.arange(len(rollout.texts)).flip(0)[:2]
    part = strategy(rollout.select(rows), MASK, seed)
    for name in ("tokens", "scored", "weight"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    pad = torch.zeros(len(rollout.texts), extra, dtype=torch.long)
    padded = dataclasses.replace(
        rollout,
        prompt_ids=torch.cat([pad, rollout.prompt_ids], -1),
        prompt_mask=torch.cat([pad.bool(), rollout.prompt_mask], -1),
    )
    assert torch.equal(strategy(padded, MASK, seed).tokens[:, :, extra:], whole.tokens)
