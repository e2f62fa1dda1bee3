"""Decoding beyond the goldens: batches, seeds, templates, early stops."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spg import config
from spg.core.seeding import Streams
from spg.core.types import Prompts, Rollout
from spg.models.choice import Measure
from spg.models.factory import build_policy
from spg.models.network import Positions
from spg.models.policy import Policy
from spg.models.tokenizer import tiny_tokenizer
from spg.rollout.decoder import CONFIDENCE, Decoder
from spg.rollout.schedule import transfer_counts
from tests.helpers import columns, golden_policy, open_prompts, small_policy


def ragged() -> Prompts:
    """Four prompts of 2 to 7 tokens, left padded."""
    ids = torch.randint(5, 28, (4, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(7) >= torch.tensor([[0], [2], [5], [1]])
    return open_prompts(ids, 12, mask)


def alone(prompts: Prompts, row: int) -> Prompts:
    """Return one prompt without its padding."""
    one = prompts.select(torch.tensor([row]))
    keep = one.mask[0]
    return dataclasses.replace(one, ids=one.ids[:, keep], mask=one.mask[:, keep])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", [*CONFIDENCE, "random"])
def test_rows_of_a_batch_decode_as_they_would_alone(temperature: float, remasking: str) -> None:
    policy = small_policy()
    decoder = Decoder(12, 4, 6, temperature, remasking, stop_at_eos=False)
    together = decoder(policy, ragged(), 11)
    for row in range(4):
        single = decoder(policy, alone(ragged(), row), 11)
        assert torch.equal(single.completion_ids[0], together.completion_ids[row])
        assert torch.equal(single.commit_step[0], together.commit_step[row])


def test_each_row_follows_its_own_stream_wherever_it_stands() -> None:
    policy = small_policy()
    decoder = Decoder(12, 4, 6, 1.0, stop_at_eos=False)
    order = torch.tensor([2, 0, 3, 1])
    first = decoder(policy, ragged(), 0)
    moved = decoder(policy, ragged().select(order), 0)
    assert torch.equal(moved.completion_ids, first.completion_ids[order])
    renumbered = dataclasses.replace(ragged(), index=torch.tensor([0, 51, 2, 53]))
    others = decoder(policy, renumbered, 0)
    same = (others.completion_ids == first.completion_ids).all(-1)
    assert same.tolist() == [True, False, True, False]
    assert not (decoder(policy, ragged(), 1).completion_ids == first.completion_ids).all(-1).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_softmax(temperature: float) -> None:
    policy = small_policy()
    n = 20000
    tokens = torch.tensor([[5, 6, policy.mask_id]])
    noise = torch.rand(n, 1, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ids, confidence = policy.propose(
        tokens.expand(n, 3), None, columns(tokens, 2, 3).expand(n, 1), temperature, noise
    )
    with torch.no_grad():
        logits = policy.network.logits(policy.network.hidden(tokens)[0, 2])
    allowed = logits.clone()
    allowed[[policy.mask_id, policy.pad_id]] = -torch.inf
    allowed[len(policy.tokenizer) :] = -torch.inf
    expected = (allowed / temperature).softmax(-1)
    frequency = ids.flatten().bincount(minlength=len(expected)) / n
    spread = (expected * (1 - expected) / n).sqrt().clamp_min(1e-4)
    assert bool(((frequency - expected).abs() < 5 * spread).all())
    assert frequency[policy.mask_id] == 0
    assert torch.allclose(confidence, logits.softmax(-1)[ids], atol=1e-6), "unnoised, at temperature 1"


def test_random_remasking_commits_every_position_equally() -> None:
    policy = small_policy()
    n = 3000
    prompts = open_prompts(torch.full((n, 1), 5), 4)
    rollout = Decoder(4, 4, 4, remasking="random", stop_at_eos=False)(policy, prompts, 0)
    first = (rollout.commit_step == 0).float().mean(0)
    assert torch.allclose(first, torch.full((4,), 0.25), atol=0.04)


def test_blocks_share_no_randomness() -> None:
    policy = small_policy()
    n = 500
    with torch.no_grad():
        policy.network.get_parameter("model.transformer.ff_out.weight").zero_()  # 31 tokens, all alike
    prompts = open_prompts(torch.full((n, 1), 5), 8)
    rollout = Decoder(8, 4, 8, 1.0, "random", stop_at_eos=False)(policy, prompts, 0)
    same_order = (rollout.commit_step[:, :4] + 4 == rollout.commit_step[:, 4:]).all(-1).float().mean()
    assert float(same_order) == pytest.approx(1 / 24, abs=0.03)
    same_token = (rollout.completion_ids[:, :4] == rollout.completion_ids[:, 4:]).float().mean()
    assert float(same_token) == pytest.approx(1 / 31, abs=0.02)


def test_commit_steps_keep_the_order_of_blocks_and_the_counts() -> None:
    policy = small_policy()
    rollout = Decoder(12, 5, 6, stop_at_eos=False)(policy, ragged())  # blocks of 5, 5 and 2, 2 steps each
    for start, stop, steps in ((0, 5, (0, 1)), (5, 10, (2, 3)), (10, 12, (4, 5))):
        within = rollout.commit_step[:, start:stop]
        sizes = [-(-(stop - start) // 2), (stop - start) // 2]
        for step, size in zip(steps, sizes, strict=True):
            assert ((within == step).sum(-1) == size).all()


def test_a_block_longer_than_the_completion_is_the_completion() -> None:
    policy = small_policy()
    first, second = (Decoder(12, size, 6, stop_at_eos=False)(policy, ragged()) for size in (12, 100))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.commit_step, second.commit_step)


def test_steps_that_do_not_divide_are_rounded_down() -> None:
    """Seven steps for three blocks: two each, as in the reference."""
    rollout = Decoder(12, 4, 7, stop_at_eos=False)(small_policy(), ragged())
    assert torch.equal(rollout.commit_step.sort(-1).values, (torch.arange(12) // 2).expand(4, 12))


def test_fewer_steps_than_blocks_means_one_step_a_block() -> None:
    rollout = Decoder(12, 4, 1, stop_at_eos=False)(small_policy(), ragged())
    assert torch.equal(rollout.commit_step, (torch.arange(12) // 4).expand(4, 12))


@pytest.mark.parametrize(("remasking", "measure"), CONFIDENCE.items())
def test_the_most_confident_are_committed_first(remasking: str, measure: Measure) -> None:
    policy = small_policy()
    prompts = ragged()
    rollout = Decoder(12, 12, 12, remasking=remasking, stop_at_eos=False)(policy, prompts)
    tokens = torch.cat([prompts.ids, torch.full((4, 12), policy.mask_id)], -1)
    mask = torch.cat([prompts.mask, torch.ones(4, 12, dtype=torch.bool)], -1)
    for step in range(12):
        ids, confidence = policy.propose(tokens, mask, columns(tokens, 7, 19), 0.0, None, [measure])
        decided = tokens[:, 7:] != policy.mask_id
        taken = confidence.masked_fill(decided, -torch.inf).argmax(-1, keepdim=True)
        assert torch.equal((rollout.commit_step == step).long().argmax(-1, keepdim=True), taken)
        tokens.scatter_(1, 7 + taken, ids.gather(1, taken))
    assert torch.equal(tokens[:, 7:], rollout.completion_ids)


@pytest.mark.parametrize("remasking", [*CONFIDENCE, "random"])
def test_each_step_commits_its_share_of_a_block_s_holes(remasking: str) -> None:
    given = torch.rand(16, 14, generator=torch.Generator().manual_seed(4)) < 0.4
    prompts = dataclasses.replace(open_prompts(torch.full((16, 3), 5), 14), given=given)
    rollout = Decoder(14, 5, 9, remasking=remasking, stop_at_eos=False)(small_policy(), prompts, 2)
    for number, start in enumerate((0, 5, 10)):
        block = slice(start, start + 5)
        committed = rollout.commit_step[:, block].unsqueeze(-1) == number * 3 + torch.arange(3)
        assert torch.equal(committed.sum(1), transfer_counts((~given[:, block]).sum(-1), 3))
        assert torch.equal(committed.any(-1), ~given[:, block]), "each hole once, in a step of its block"


def with_template(given: list[bool], token: int = 9, prompt: Tensor | None = None) -> Prompts:
    prompts = open_prompts(torch.full((3, 2), 5) if prompt is None else prompt, len(given))
    mask = torch.tensor(given).expand(3, -1)
    return dataclasses.replace(prompts, template=torch.full_like(mask, token, dtype=torch.long), given=mask)


def test_given_tokens_stay_and_only_holes_are_decoded() -> None:
    given = [True, False, False, True, True, True, True, False]
    rollout = Decoder(8, 4, 4, stop_at_eos=False)(small_policy(), with_template(given))
    mask = torch.tensor(given)
    assert (rollout.completion_ids[:, mask] == 9).all()
    assert (rollout.commit_step[:, mask] == -1).all()
    assert (rollout.commit_step[:, ~mask] >= 0).all()
    assert torch.equal(rollout.holes, (~rollout.given) & rollout.completion_mask)
    # two holes in the first block, one a step; one hole in the second, in its first step
    assert rollout.commit_step[:, [1, 2]].sort(-1).values.tolist() == [[0, 1]] * 3
    assert rollout.commit_step[:, 7].tolist() == [2] * 3


def test_given_tokens_are_seen_by_the_policy() -> None:
    policy = small_policy()
    likeliest = []
    for token in (9, 20):
        prompts = with_template([False] + [True] * 7, token)
        rollout = Decoder(8, 4, 2, stop_at_eos=False)(policy, prompts)
        with torch.no_grad():
            ids = torch.tensor([[5, 5, policy.mask_id] + [token] * 7])
            logits = policy.network.logits(policy.network.hidden(ids))[0, 2]
        logits[[policy.mask_id, policy.pad_id]] = -torch.inf
        logits[len(policy.tokenizer) :] = -torch.inf
        likeliest.append(int(logits.argmax()))
        assert rollout.completion_ids[:, 0].tolist() == [likeliest[-1]] * 3
    assert likeliest[0] != likeliest[1], "also where they follow in a later block"


def test_a_template_of_given_tokens_only_needs_no_call() -> None:
    policy = Ending([0, 0, 0])
    rollout = Decoder(4, 2, 4)(policy, with_template([True] * 4))
    assert policy.calls == 0
    assert (rollout.completion_ids == 9).all()
    assert not rollout.holes.any()


class Ending(Policy):
    """Proposes EOS at one position of each row and 7 elsewhere."""

    def __init__(self, ends: list[int]) -> None:
        base = small_policy()
        super().__init__(base.network, base.tokenizer)
        self.ends = torch.tensor(ends)
        self.calls = 0

    def propose(
        self, tokens: Tensor, mask: Tensor | None, columns: Tensor, *rest: Any, **more: Any
    ) -> tuple[Tensor, ...]:
        self.calls += 1
        position = columns - 2
        rows = tokens[:, 0] - 5
        ids = torch.where(position == self.ends[rows].unsqueeze(-1), self.eos_id, 7)
        return ids, Streams(0, rows).uniform(16).gather(1, position)


def numbered(n: int) -> Tensor:
    """Prompts [n 2] that tell their rows apart."""
    return (5 + torch.arange(n)).unsqueeze(-1).expand(n, 2)


def decode_ending(ends: list[int], stop: bool) -> tuple[Rollout, int]:
    policy = Ending(ends)
    prompts = open_prompts(numbered(len(ends)), 16)
    rollout = Decoder(16, 4, 8, stop_at_eos=stop)(policy, prompts)
    return rollout, policy.calls


def test_stopping_early_changes_nothing_up_to_eos() -> None:
    ends = [1, 6, 3]
    stopped, calls = decode_ending(ends, stop=True)
    full, all_calls = decode_ending(ends, stop=False)
    assert (calls, all_calls) == (4, 8), "two blocks of two steps instead of four"
    mask = full.completion_mask
    assert torch.equal(stopped.completion_mask, mask)
    assert mask.sum(-1).tolist() == [2, 7, 4]
    assert torch.equal(stopped.completion_ids[mask], full.completion_ids[mask])
    assert torch.equal(stopped.commit_step[mask], full.commit_step[mask])
    assert stopped.texts == full.texts


def test_stopping_early_with_a_real_network() -> None:
    policy = golden_policy()
    policy.eos_id = 9  # a token that the random network likes
    prompts = open_prompts(torch.arange(3 * 9).view(3, 9), 32)
    stopped, full = (Decoder(32, 8, 16, stop_at_eos=s)(policy, prompts) for s in (True, False))
    assert torch.equal(stopped.completion_mask, full.completion_mask)
    assert torch.equal(
        stopped.completion_ids[stopped.completion_mask], full.completion_ids[full.completion_mask]
    )
    assert (stopped.commit_step == -1).any()


def test_stopping_early_spares_the_given_tokens_behind() -> None:
    policy = Ending([1, 1, 1])
    given = [True, False, False, False, True, False, True, False]
    rollout = Decoder(8, 4, 4)(policy, with_template(given, prompt=numbered(3)))
    assert policy.calls == 2, "three holes in the first block's two steps, nothing after"
    eos = policy.eos_id
    assert rollout.completion_ids.tolist() == [[9, eos, 7, 7, 9, eos, 9, eos]] * 3
    assert rollout.completion_mask.tolist() == [[True] * 2 + [False] * 6] * 3
    assert (rollout.commit_step[:, [0, 4, 5, 6, 7]] == -1).all()


@pytest.mark.parametrize(("temperature", "remasking"), [(0.9, "low_confidence"), (0.0, "random")])
def test_randomness_needs_a_seed(temperature: float, remasking: str) -> None:
    with pytest.raises(ValueError, match="needs a seed"):
        Decoder(8, 4, 4, temperature, remasking)(small_policy(), ragged())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("gen_length", 0, "a whole number, 1 or more"),
        ("block_size", 2.5, "a whole number, 1 or more"),
        ("steps", 0, "a whole number, 1 or more"),
        ("temperature", -1, "a number, 0 or more"),
        ("remasking", "best", "one of: low_confidence, random, margin, entropy"),
        ("near_tie", -1e-4, "a number, 0 or more, or null"),
        ("stop_at_eos", 1, "true or false"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any, allowed: str) -> None:
    values = {"gen_length": 8, "block_size": 4, "steps": 4, name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is out of range; allowed: {allowed}")):
        Decoder(**values)


class Table(nn.Module):
    """A network that gives each row and column of a window the logits written down for it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = logits

    def hidden(self, tokens: Tensor, mask: Tensor | None, at: Positions, cache: None) -> Tensor:
        """Return the logits at `at`; a row tells its number by its only prompt token."""
        return at.select(self.table[(tokens[:, :1] - 5), at.columns - 1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return what `hidden` found."""
        return hidden

    @property
    def head_width(self) -> int:
        """Number of tokens."""
        return self.table.shape[-1]


def table_policy(rows: list[list[list[float]]]) -> Policy:
    """Return a policy with probabilities proportional to these, of the tokens from 5 on, at [R T]."""
    table = torch.full((len(rows), len(rows[0]), 32), -1e4, dtype=torch.double)
    for r, row in enumerate(rows):
        for t, values in enumerate(row):
            table[r, t, 5 : 5 + len(values)] = torch.tensor(values, dtype=torch.double).log()
    return Policy(Table(table.float()), tiny_tokenizer())


def from_table(policy: Policy, rows: int, steps: int, length: int, **settings: Any) -> Rollout:
    """Decode a table's rows, each a block of `length` in `steps`."""
    prompts = open_prompts(5 + torch.arange(rows).unsqueeze(-1), length)
    if "given" in settings:
        given = torch.tensor(settings.pop("given")).expand(rows, -1)
        prompts = dataclasses.replace(prompts, given=given, template=torch.full((rows, length), 9))
    return Decoder(length, length, steps, stop_at_eos=False, **settings)(policy, prompts, 0)


ALL: tuple[Measure, ...] = ("probability", "margin", "negative_entropy", "lead")


def measured(probabilities: list[list[float]], temperature: float = 0.0) -> list[list[float]]:
    policy = table_policy([probabilities])
    n = len(probabilities)
    tokens = torch.tensor([[5] + [policy.mask_id] * n])
    noise = torch.full((1, n), 0.999, dtype=torch.double)
    ids, *values = policy.propose(tokens, None, columns(tokens, 1, 1 + n), temperature, noise, ALL)
    assert [v.shape for v in values] == [ids.shape] * 4
    return torch.stack(values, -1)[0].tolist()


def test_measures_of_distributions_written_down() -> None:
    uniform, uneven, sure = measured([[0.25] * 4, [0.2, 0.5, 0.3], [1.0]])
    assert uniform == pytest.approx([0.25, 0, -math.log(4), 0])
    entropy = 0.5 * math.log(2) + 0.3 * math.log(1 / 0.3) + 0.2 * math.log(5)
    assert uneven == pytest.approx([0.5, 0.2, -entropy, math.log(5 / 3)])
    assert sure[:3] == [1, 1, 0]
    assert math.isfinite(sure[3])


def test_measures_are_those_at_temperature_one_also_of_draws() -> None:
    greedy, drawn = (measured([[0.5, 0.3, 0.2]], temperature)[0] for temperature in (0.0, 1.5))
    assert drawn[0] == pytest.approx(0.2), "of the token drawn: the last"
    assert drawn[1:] == greedy[1:]


def test_measures_where_the_mask_is_likeliest() -> None:
    """It takes its share of the probability, as in the reference, but is no alternative."""
    policy = table_policy([[[]]])
    policy.network.table[0, 0, [policy.mask_id, 7, 8, 9]] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    values = policy.propose(torch.tensor([[5, policy.mask_id]]), None, torch.tensor([[1]]), 0.0, None, ALL)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.15, 0.05))
    assert [float(v) for v in values] == pytest.approx([7, 0.3, 0.15, -entropy, math.log(2)])


def test_measures_go_to_their_rows() -> None:
    policy = table_policy([[[0.6, 0.4]], [[0.2, 0.5, 0.3]], [[0.1, 0.1, 0.8]]])
    numbers = torch.tensor([2, 0, 1, 0, 2])
    tokens = torch.stack([5 + numbers, torch.full_like(numbers, policy.mask_id)], -1)
    rows = [policy.propose(row.unsqueeze(0), None, torch.tensor([[1]]), 0.0, None, ALL) for row in tokens]
    for together, *alone in zip(
        policy.propose(tokens, None, columns(tokens, 1, 2), 0.0, None, ALL), *rows, strict=True
    ):
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("remasking", "order"),
    [("low_confidence", [0, 1, 2]), ("margin", [2, 0, 1]), ("entropy", [0, 2, 1])],
)
def test_what_each_confidence_prefers(remasking: str, order: list[int]) -> None:
    two_alike, one_and_many, three = [0.5, 0.49, 0.01], [0.45] + [0.05] * 11, [0.4, 0.3, 0.3]
    policy = table_policy([[two_alike, one_and_many, three]])
    rollout = from_table(policy, 1, 3, 3, remasking=remasking)
    assert rollout.commit_step.tolist() == [order]


@pytest.mark.parametrize("remasking", CONFIDENCE)
def test_of_equals_the_leftmost_comes_first(remasking: str) -> None:
    rollout = from_table(table_policy([[[0.5, 0.5]] * 4]), 1, 4, 4, remasking=remasking, near_tie=0.0)
    assert rollout.commit_step.tolist() == [[0, 1, 2, 3]]
    assert rollout.completion_ids.tolist() == [[5] * 4]
    assert rollout.near_ties.tolist() == [4 + 3], "four tokens, and an order in all steps but the last"


@pytest.mark.parametrize("remasking", [*CONFIDENCE, "random"])
def test_near_ties_of_tokens_are_counted_where_the_token_is_committed(remasking: str) -> None:
    close, apart, far = ([1.0, math.exp(-gap)] for gap in (0.5e-4, 2e-4, 3.0))
    policy = table_policy([[close, apart, close], [apart, apart, far], [far, far, close]])
    at_once = from_table(policy, 3, 1, 3, remasking=remasking, near_tie=1e-4)
    assert at_once.near_ties.tolist() == [2, 0, 1]
    pair = table_policy([[close, far], [far, close]])
    one_by_one = from_table(pair, 2, 2, 2, remasking=remasking, near_tie=1e-4)
    assert one_by_one.near_ties.tolist() == [1, 1], "not again in the steps that leave it masked"


@pytest.mark.parametrize(("gap", "expected"), [(0.5e-4, 1), (2e-4, 0)])
def test_near_ties_of_the_order_are_counted_between_committed_and_left(gap: float, expected: int) -> None:
    """No two tokens are close here: a count of these alone would be 0."""
    first, second, last = [0.6, 0.4], [0.6 - gap, 0.4 + gap], [0.3, 0.2, 0.2, 0.15, 0.15]
    policy = table_policy([[first, second, last]])
    assert from_table(policy, 1, 3, 3, near_tie=1e-4).near_ties.tolist() == [expected]
    assert from_table(policy, 1, 2, 3, near_tie=1e-4).near_ties.tolist() == [0], "committed together"
    assert from_table(policy, 1, 1, 3, near_tie=1e-4).near_ties.tolist() == [0], "none left"
    given = [False, True, False]
    assert from_table(policy, 1, 2, 3, near_tie=1e-4, given=given).near_ties.tolist() == [0], "no decision"


def test_a_random_order_has_no_near_ties() -> None:
    policy = table_policy([[[0.9, 0.1]] * 4])  # 2.2 apart in logits; no two random numbers are 1 apart
    assert from_table(policy, 1, 4, 4, near_tie=1.0, remasking="random").near_ties.tolist() == [0]


@pytest.mark.parametrize(("remasking", "units"), [("margin", 2.0), ("entropy", math.log(1.5))])
def test_near_ties_of_the_order_are_in_the_units_of_the_confidence(remasking: str, units: float) -> None:
    """Margin of p and 1 - p: 2 p - 1; the slope of their entropy: log(p / (1 - p))."""
    gap = 1e-3
    policy = table_policy([[[0.6, 0.4], [0.6 - gap, 0.4 + gap]]])
    for near_tie, expected in ((0.9 * units * gap, 0), (1.1 * units * gap, 1)):
        rollout = from_table(policy, 1, 2, 2, near_tie=near_tie, remasking=remasking)
        assert rollout.near_ties.tolist() == [expected]


def test_near_ties_follow_their_rows() -> None:
    """Rows that need fewer steps than others, or are done before them, are counted as they would be alone."""
    policy = golden_policy()
    policy.eos_id = 9  # a token that the random network likes
    given = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    prompts = dataclasses.replace(open_prompts(torch.arange(54).view(6, 9), 16), given=given)
    decoder = Decoder(16, 4, 8, near_tie=1e-2)
    together = decoder(policy, prompts)
    alone = [int(decoder(policy, prompts.select(torch.tensor([i]))).near_ties) for i in range(6)]
    assert together.near_ties.tolist() == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "near_tie": 1.0}, {"remasking": "random"}])
def test_what_is_not_asked_is_not_measured(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = table_policy([[[0.5, 0.5]] * 4])
    asked = []
    original = policy.propose
    monkeypatch.setattr(policy, "propose", lambda *a, **k: asked.append(list(a[5])) or original(*a, **k))
    rollout = from_table(policy, 1, 4, 4, **settings)
    assert rollout.near_ties.tolist() == [0]
    assert asked == [["probability"]] * 4, "which rollouts keep, whatever the order is by"


@pytest.mark.parametrize("remasking", [*CONFIDENCE, "random"])
def test_counting_near_ties_changes_nothing_else(remasking: str) -> None:
    policy = small_policy()
    plain, counted = (
        Decoder(12, 4, 6, remasking=remasking, near_tie=near_tie)(policy, ragged(), 0)
        for near_tie in (None, 1.0)
    )
    assert torch.equal(plain.completion_ids, counted.completion_ids)
    assert torch.equal(plain.commit_step, counted.commit_step)
    assert counted.near_ties.dtype == torch.long
    assert (counted.near_ties > 0).all()


def same_in_any_batches(policy: Policy, decoder: Decoder, prompts: Prompts) -> None:
    """Decode `prompts` at once and in batches, each no wider than its longest prompt; assert equality."""
    n = len(prompts.ids)
    whole = decoder(policy, prompts, 0)
    clear = whole.near_ties == 0
    assert float(clear.float().mean()) > 0.75, "else there is little to compare"
    for size in (1, 7, 16):
        for rows in torch.arange(n).split(size):
            part = prompts.select(rows)
            used = part.mask.any(0)
            part = dataclasses.replace(part, ids=part.ids[:, used], mask=part.mask[:, used])
            ids = decoder(policy, part, 0).completion_ids
            assert torch.equal(ids[clear[rows]], whole.completion_ids[rows][clear[rows]]), (size, rows)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        pytest.param(["decoding.remasking=margin"], marks=pytest.mark.long),
        pytest.param(["decoding=full_sequence", "decoding.remasking=entropy"], marks=pytest.mark.long),
    ],
)
def test_greedy_sudoku_is_the_same_in_batches_of_any_size(lines: list[str]) -> None:
    cfg = config.compose("config", lines)
    policy, task = build_policy(cfg).eval(), config.build(cfg.task)
    examples = task.examples("heldout")[:64]
    number = torch.arange(64)
    prompts = policy.prepare(
        examples,
        [*map(task.prompt, examples)],
        [*map(task.template, examples)],
        number,
        number,
        cfg.gen_length,
    )
    same_in_any_batches(policy, config.build(cfg.decoding, temperature=0.0, near_tie=1e-4), prompts)


@pytest.mark.parametrize("remasking", [*CONFIDENCE, "random"])
def test_greedy_decoding_is_the_same_in_batches_with_other_padding(remasking: str) -> None:
    g = torch.Generator().manual_seed(9)
    ids = torch.randint(5, 28, (32, 9), generator=g)
    prompts = open_prompts(ids, 12, torch.arange(9) >= torch.randint(0, 9, (32, 1), generator=g))
    same_in_any_batches(small_policy(), Decoder(12, 6, 6, remasking=remasking, near_tie=1e-5), prompts)


PRESETS = {
    "semi_autoregressive": (12, "low_confidence"),
    "semi_ar_16": (16, "low_confidence"),
    "semi_ar_32": (32, "low_confidence"),
    "semi_ar_64": (64, "low_confidence"),
    "semi_ar_random": (32, "random"),
    "threshold": (12, "low_confidence"),
    "full_sequence": (256, "low_confidence"),
    "full_random": (256, "random"),
}


def test_there_are_no_other_presets() -> None:
    assert {path.stem for path in (config.CONF_DIR / "decoding").glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    size, remasking = PRESETS[name]
    for length in (256, 24):
        cfg = config.compose("config", [f"decoding={name}", f"gen_length={length}"])
        decoder = config.build(cfg.decoding, temperature=0.0, near_tie=1e-4)
        assert (decoder.block_size, decoder.remasking) == (min(size, length), remasking)
        assert (decoder.temperature, decoder.near_tie) == (0.0, 1e-4)
        assert config.build(cfg.masking).block_size == 12, "blocks of masking are another matter"
