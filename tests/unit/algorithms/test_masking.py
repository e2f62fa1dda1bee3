"""Masking strategies: statistics of the authors' code, templates, and what must always hold."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spg.algorithms.estimators import ELBO, Mixture, Sandwich
from spg.algorithms.masking import (
    BlockAll,
    BlockRandom,
    Complementary,
    Full,
    MaskingStrategy,
    Random,
    Spread,
    Trajectory,
)
from spg.algorithms.objectives.spg import SPG
from spg.core.types import Experience, MaskedSamples, Rollout, UpdateBatch
from spg.rollout.decoder import Decoder
from tests.helpers import GOLDEN, golden, rollout_of, small_policy
from tests.unit.models.test_cache import ragged

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
    blocks = (BlockRandom(4, 2), BlockAll(4, 2, block_choice="uniform"))
    for strategy in (Full(2), Random(2), *blocks, Spread(2), Complementary(2), Trajectory()):
        samples = strategy(rollout, MASK, 0)
        assert not samples.scored.any()
        assert not samples.weight.any()
        logps = torch.full(samples.scored.shape, -1.0, requires_grad=True)
        objective = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)))
        loss = objective(logps, UpdateBatch.of(experience, samples)).loss
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
    rollout = rollout_of(
        completion_mask & ~given_tokens,
        given=given_tokens,
        completion_mask=completion_mask,
        prompt_mask=torch.arange(4) >= pads,
    )
    # every hole of the region and some behind it were decoded, at a made-up step
    steps = torch.randint(0, draw(st.integers(1, 6)), (b, t), generator=g)
    late = ~completion_mask & (torch.rand(b, t, generator=g) < 0.5)
    return dataclasses.replace(rollout, commit_step=steps.masked_fill(given_tokens | late, -1))


STRATEGIES = [
    Full(2),
    Random(3),
    Random(2, region="all"),
    BlockRandom(3, 2),
    BlockRandom(4, 5, 0.5, block_choice="uniform"),
    BlockRandom(3, 2, scored_positions="block"),
    BlockAll(2, 3, 0.9),
    BlockRandom(100, 2, 1.0, region="all"),
    BlockRandom(3, 5, draws="antithetic"),
    BlockRandom(3, 7, draws="stratified", block_choice="uniform", scored_positions="block"),
    Spread(3),
    Spread(2, region="all"),
]
# some draws score nothing, or their weights are others than 1/t
OTHERS = [
    Complementary(4),
    Complementary(2, 0.3, "all"),
    BlockRandom(3, 4, draws="complementary"),
    BlockRandom(4, 2, 0.9, "all", "uniform", "block", draws="complementary"),
    Trajectory(),
    Trajectory(0.5, "all"),
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rollouts(), st.sampled_from(STRATEGIES + OTHERS), st.integers(0, 1000))
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
    assert torch.equal(samples.weight > 0, samples.scored)
    if isinstance(strategy, Trajectory):
        assert torch.equal(samples.weight, samples.scored * float(samples.scored.shape[1]))
    if strategy in OTHERS:
        return
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
    for make in (Complementary, lambda n: BlockRandom(4, n, draws="complementary")):
        with pytest.raises(ValueError, match="complementary pairs need an even num_mc; set num_mc=4"):
            make(3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rollouts(), st.sampled_from(STRATEGIES + OTHERS), st.integers(0, 1000), st.integers(1, 3))
def test_neighbours_and_padding_change_no_draw(
    rollout: Rollout, strategy: MaskingStrategy, seed: int, extra: int
) -> None:
    """What lets several processes, each with its own groups, draw the masks of one with all of them."""
    whole = strategy(rollout, MASK, seed)
    rows = torch.arange(len(rollout.texts)).flip(0)[:2]
    part = strategy(rollout.select(rows), MASK, seed)
    draws = part.scored.shape[1]  # of a trajectory, as many as these rows have steps
    assert not whole.scored[rows, draws:].any()
    for name in ("tokens", "scored"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows, :draws])
    assert torch.allclose(part.weight / draws, whole.weight[rows, :draws] / whole.scored.shape[1])
    pad = torch.zeros(len(rollout.texts), extra, dtype=torch.long)
    padded = dataclasses.replace(
        rollout,
        prompt_ids=torch.cat([pad, rollout.prompt_ids], -1),
        prompt_mask=torch.cat([pad.bool(), rollout.prompt_mask], -1),
    )
    assert torch.equal(strategy(padded, MASK, seed).tokens[:, :, extra:], whole.tokens)


def masked_counts(samples: MaskedSamples) -> Tensor:
    """Return how many positions each draw scores, [B M]."""
    return samples.scored.sum(-1)


def test_ratios_are_spread_over_the_inner_updates() -> None:
    """With 400 positions and 4 updates: the ratios of a draw lie a quarter apart, from a uniform start."""
    strategy = Spread(2)
    rollout = rollout_of(torch.ones(150, 400, dtype=torch.bool))
    rounds = strategy.rounds(rollout, MASK, [7, 1, 4, 2])
    counts = torch.stack([masked_counts(samples) for samples in rounds])
    for inner in range(4):
        apart = (counts[inner] - counts[0] - 100 * inner) % 400
        assert ((apart + 1) % 400 <= 2).all(), "up to rounding of the share"
    start = counts[0].flatten().double() / 400
    for power in (1, 2):
        mean = float((start**power).mean())
        assert mean == pytest.approx(1 / (power + 1), abs=5 * 0.3 / 300**0.5)
    assert (counts[0, :, 0] != counts[0, :, 1]).float().mean() > 0.9, "each draw has its own"
    first = rounds[0].scored[:, 0]
    assert not any((first & ~samples.scored[:, 0]).sum() == 0 for samples in rounds[1:]), "own positions"
    alone = strategy(rollout, MASK, 7)
    assert torch.equal(alone.tokens, strategy.rounds(rollout, MASK, [7])[0].tokens)
    assert torch.equal(alone.tokens, rounds[0].tokens)
    assert strategy.rounds(rollout, MASK, []) == []


def test_a_spread_count_is_uniform_and_so_are_its_positions() -> None:
    samples = Spread(1).rounds(repeated(5, 8, 2), MASK, [3, 4])[1]
    fair = {str(count): 0.2 for count in range(1, 6)}
    assert same_distribution(masked_counts(samples).flatten(), fair, math.inf)
    where = samples.scored[:, 0, :5].float().mean(0)
    assert torch.allclose(where, torch.full((5,), 0.6), atol=0.02)


def test_complementary_draws_share_out_the_region() -> None:
    samples = Complementary(4)(repeated(5, 8, 2), MASK, 0)
    pairs = samples.scored.unflatten(1, (2, 2))
    assert torch.equal(pairs.sum(2), samples.region.unsqueeze(1).expand(-1, 2, -1).long())
    fair = {str(count): 1 / 6 for count in range(6)}
    for draw in range(4):
        assert same_distribution(masked_counts(samples)[:, draw], fair, math.inf)
    together = (masked_counts(samples)[:, 0] == masked_counts(samples)[:, 2]).float().mean()
    assert float(together) == pytest.approx(1 / 6, abs=0.015), "pairs are independent"


def orders(length: int, logp: dict[tuple[bool, ...], Tensor]) -> float:
    """Return the mean over all orders of the log-probability of `length` tokens, revealed one by one.

    logp: of each token [length], by the mask that it is seen under.
    """
    total = 0.0
    every = list(itertools.permutations(range(length)))
    for order in every:
        hidden = [True] * length
        for position in order:
            total += float(logp[tuple(hidden)][position])
            hidden[position] = False
    return total / len(every)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_complementary_elbo_is_unbiased(length: int) -> None:
    """All masks of up to four positions, with their probabilities and the weights that they are given."""
    g = torch.Generator().manual_seed(length)
    masks = list(itertools.product((False, True), repeat=length))
    logp = {mask: -torch.rand(length, generator=g).double() for mask in masks}
    samples = Complementary(2)(repeated(length, 6, 2), MASK, 0)
    firsts = [tuple(row) for row in samples.scored[:, 0, :length].tolist()]
    expected = 0.0
    for mask in masks:
        rows = [row for row, first in enumerate(firsts) if first == mask]
        probability = 1 / ((length + 1) * math.comb(length, sum(mask)))
        assert close(len(rows) / DRAWS, probability, math.inf)
        other = tuple(not masked for masked in mask)
        seen = torch.stack([logp[mask], logp[other]])
        value = (samples.weight[rows[0], :, :length].double() * seen).sum(-1).mean()
        expected += probability * float(value)
    assert expected == pytest.approx(orders(length, logp), rel=1e-6)


@pytest.mark.parametrize("name", ["beta0_mc1", "beta0_mc2", "beta0.003_mc2_mu2_step1"])
def test_the_complementary_elbo_is_espos(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' ELBO from their masks and logits, with the weights that these masks are given here."""
    z, args = golden(f"baselines/espo_{name}.npz")
    perturbed = z["perturbed"].transpose(0, 1)  # [B M L]
    width, mask_id = z["prompt_ids"].shape[1], args["mask_id"]
    hidden = perturbed[..., width:] == mask_id
    assert torch.allclose(z["p_mask"], hidden[:, ::2].sum(-1).T / (hidden.shape[-1] + 1))
    rollout = rollout_of(
        z["completion_mask"].bool(),
        prompt_ids=z["prompt_ids"],
        prompt_mask=torch.ones_like(z["prompt_ids"], dtype=torch.bool),
        completion_ids=z["completion_ids"],
    )
    monkeypatch.setattr("spg.algorithms.masking.random.choose_exactly", lambda *given: hidden[:, ::2])
    samples = Complementary(2 * args["num_mc"], region="all")(rollout, mask_id, 0)
    assert torch.equal(samples.tokens, perturbed)
    logps = z["logits"].transpose(0, 1)[:, :, width:].log_softmax(-1)
    index = z["completion_ids"][:, None, :, None].expand(*logps.shape[:3], 1)
    elbo = ELBO("elbo_weight")(logps.gather(-1, index).squeeze(-1), samples).sum(-1)
    assert torch.allclose(elbo, z["elbo"], rtol=1e-5)


@pytest.mark.parametrize("region", ["to_eos", "all"])
@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_a_trajectory_has_the_log_probabilities_of_the_rollout(region: str, stop_at_eos: bool) -> None:
    policy, prompts = small_policy(), ragged()
    rollout = Decoder(12, 4, 6, 1.0, stop_at_eos=stop_at_eos)(policy, prompts, 5)
    assert len(rollout.lengths.unique()) > 1
    samples = Trajectory(region=region)(rollout, policy.mask_id, 0)
    counted = samples.region & (rollout.commit_step >= 0)
    assert torch.equal(samples.scored.sum(1), counted.long()), "every decoded token once"
    steps = [row[row >= 0].unique().tolist() for row in rollout.commit_step.masked_fill(~counted, -1)]
    for row, own in enumerate(steps):
        for draw, step in enumerate(own):
            assert torch.equal(samples.scored[row, draw], counted[row] & (rollout.commit_step[row] == step))
        assert not samples.scored[row, len(own) :].any(), "steps behind the EOS take no draw"
    draws = samples.scored.shape[1]
    assert draws == max(map(len, steps))
    logps = policy.token_logps(
        samples.tokens.flatten(0, 1),
        rollout.attention_mask.repeat_interleave(draws, 0),
        rollout.completion_ids.repeat_interleave(draws, 0),
        samples.scored.flatten(0, 1),
    ).view_as(samples.scored)
    total = ELBO("elbo_weight")(logps, samples)
    assert torch.allclose(total, rollout.commit_logps * counted, atol=1e-4)


def test_a_trajectory_leaves_out_the_steps_of_other_rows() -> None:
    rollout = repeated(4, 6, 2).select(torch.arange(2))
    step = torch.tensor([[7, 2, 2, 5, 0, 1], [3, 3, 4, 4, 9, -1]])
    samples = Trajectory()(dataclasses.replace(rollout, commit_step=step), MASK, 0)
    scored = [[[1, 2], [3], [0]], [[0, 1], [2, 3], []]]
    assert [[one.nonzero().flatten().tolist() for one in row] for row in samples.scored] == scored
    assert torch.equal(samples.weight, samples.scored * 3.0), "as many as draws, not as steps"
    hidden = [[[0, 1, 2, 3], [0, 3], [0]], [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]]]
    seen = (samples.tokens == MASK)[..., 2:]
    assert [
        [one.nonzero().flatten().tolist() for one in seen[0]],
        *[[one.nonzero().flatten().tolist() for one in seen[1, :2]]],
    ] == hidden


def test_a_trajectory_without_steps_scores_nothing() -> None:
    """As where every token is given, or none of the decoded ones lies in the region."""
    rollout = repeated(4, 8, 2).select(torch.arange(3))
    for step in (torch.full((3, 8), -1), torch.tensor([-1] * 4 + [2] * 4).expand(3, 8)):
        samples = Trajectory()(dataclasses.replace(rollout, commit_step=step), MASK, 0)
        assert samples.scored.shape == (3, 1, 8)
        assert not samples.scored.any()
