"""Decoding beyond the goldens: batches, seeds, templates, early stops."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from spg.decoding import Decoder
from spg.policy import Policy
from spg.seeding import Streams
from spg.types import Prompts, Rollout
from tests.helpers import golden_policy, open_prompts, small_policy


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
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
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
    ids, confidence = policy.propose(tokens.expand(n, 3), None, slice(2, 3), temperature, noise)
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


def test_low_confidence_commits_the_likeliest_first() -> None:
    policy = small_policy()
    prompts = ragged()
    rollout = Decoder(12, 12, 12, stop_at_eos=False)(policy, prompts)
    tokens = torch.cat([prompts.ids, torch.full((4, 12), policy.mask_id)], -1)
    mask = torch.cat([prompts.mask, torch.ones(4, 12, dtype=torch.bool)], -1)
    for step in range(12):
        ids, confidence = policy.propose(tokens, mask, slice(7, 19), 0.0, None)
        taken = confidence.masked_fill(tokens[:, 7:] != policy.mask_id, -1).argmax(-1, keepdim=True)
        assert torch.equal((rollout.commit_step == step).long().argmax(-1, keepdim=True), taken)
        tokens.scatter_(1, 7 + taken, ids.gather(1, taken))
    assert torch.equal(tokens[:, 7:], rollout.completion_ids)


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
        self, tokens: Tensor, mask: Tensor | None, window: slice, temperature: float, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        position = torch.arange(window.start, window.stop) - 2
        rows = tokens[:, 0] - 5
        ids = torch.where(position == self.ends[rows].unsqueeze(-1), self.eos_id, 7)
        return ids, Streams(0, rows).uniform(ids.shape[1])


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
        ("remasking", "best", "one of: low_confidence, random"),
        ("stop_at_eos", 1, "true or false"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any, allowed: str) -> None:
    values = {"gen_length": 8, "block_size": 4, "steps": 4, name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is out of range; allowed: {allowed}")):
        Decoder(**values)
