"""Masking strategies: statistics of the authors' code, templates, and what must always hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spg.masking import BlockAll, BlockRandom, Full, MaskingStrategy, Random
from spg.types import MaskedSamples, Rollout
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


def close(frequency: float, expected: float, draws: float) -> bool:
    """Return whether two frequencies of about as many draws agree, to five standard errors."""
    spread = max(expected * (1 - expected), 1e-4) * (1 / draws + 1 / DRAWS)
    return abs(frequency - expected) <= 5 * spread**0.5


@pytest.mark.parametrize("setting", list(REFERENCE))
def test_frequencies_are_those_of_the_reference(setting: str) -> None:
    reference = REFERENCE[setting]
    args = reference["args"]
    prompt, total, size = reference["prompt_len"], reference["completion_len"], args["block_length"]
    block = torch.arange(total) // size
    for row in reference["rows"]:
        length, draws = row["length"], row["n_draws"]
        samples = strategy_of(args)(repeated(length, total, prompt), MASK, torch.Generator().manual_seed(1))
        masked = (samples.tokens == MASK)[:, :, prompt:]
        counts = samples.scored.sum(-1)
        for number, frequency in row["n_masked_before_eos"].items():
            ours = float((counts == int(number)).float().mean())
            assert close(ours, frequency, draws), (setting, length, number, ours, frequency)
        fraction = float((samples.tokens[:, :, :prompt] == MASK).float().mean())
        assert close(fraction, row["prompt_mask_fraction"], draws * prompt)
        if length < total:
            assert bool(masked[:, :, length:].all())
        assert torch.equal(samples.scored, masked & (torch.arange(total) < length))
        if "block" not in args["forward_type"]:
            continue
        # without noise in clean blocks the picked one is the first that holds a mask
        clean = strategy_of(args, prompt_mask_prob=0.0)
        plain = clean(repeated(length, total, prompt), MASK, torch.Generator().manual_seed(2))
        first = plain.scored.float().argmax(-1)
        picked = block[first]
        for m, frequencies in enumerate(row["block_freq_per_t"]):
            for number, frequency in frequencies.items():
                ours = float((picked[:, m] == int(number)).float().mean())
                assert close(ours, frequency, draws)
        for pair, frequency in (row.get("block_pair_freq") or {}).items():
            a, b = json.loads(pair)
            ours = float(((picked[:, 0] == a) & (picked[:, 1] == b)).float().mean())
            assert close(ours, frequency, draws)
        for width, numbers in row["n_masked_in_chosen_block"].items():
            inside = (block == picked.unsqueeze(-1)) & (torch.arange(total) < length)
            here = inside.sum(-1) == int(width)
            masked_here = (plain.scored & inside).sum(-1)[here]
            for number, frequency in numbers.items():
                ours = float((masked_here == int(number)).float().mean())
                assert close(ours, frequency, max(1, int(here.sum()) * draws / DRAWS))


def picked_blocks(strategy: MaskingStrategy, rollout: Rollout, size: int, seed: int = 0) -> Tensor:
    """Return the first block [B M] that holds a scored position."""
    samples = strategy(rollout, MASK, torch.Generator().manual_seed(seed))
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
    assert (released[:, :4] != released[:, 4:]).any(), "the second round is a permutation of its own"


def test_scored_positions_of_the_picked_block_only() -> None:
    rollout = repeated(16, 16, 2)
    samples = BlockRandom(4, 2, 0.15, scored_positions="block")(rollout, MASK, torch.Generator())
    blocks = torch.arange(16) // 4
    spans = (samples.scored * (blocks + 1)).amax(-1) - samples.scored.float().argmax(-1) // 4 - 1
    assert (spans == 0).all()
    assert (samples.scored.sum(-1) >= 1).all()


def test_region_all_scores_what_follows_eos() -> None:
    samples = Full(1, 0.0, region="all")(repeated(5, 16, 2), MASK, torch.Generator())
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
    for strategy in (Full(2), Random(2), BlockRandom(4, 2), BlockAll(4, 2)):
        samples = strategy(rollout, MASK, torch.Generator())
        assert not samples.scored.any()
        assert torch.isfinite(samples.weight).all()
        assert int(samples.weight.sum()) == 0


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
    samples: MaskedSamples = strategy(rollout, MASK, torch.Generator().manual_seed(seed))
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
    expected = samples.scored * samples.lengths[:, None, None] / samples.scored.sum(-1, keepdim=True).clamp_min(1)
    assert torch.allclose(samples.weight, expected)


def test_limits() -> None:
    with pytest.raises(ValueError, match=r"prompt_mask_prob=1.5 is out of range; allowed: a number from 0 to 1"):
        Random(prompt_mask_prob=1.5)
    with pytest.raises(ValueError, match="block_choice='fair'"):
        BlockRandom(4, block_choice="fair")
