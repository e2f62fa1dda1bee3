"""Decoding beyond the goldens: batches, seeds, templates, early stops."""

from __future__ import annotations

import pytest
import torch

from spg.decoding import Decoder
from spg.policy import Policy
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
    return Prompts(one.ids[:, keep], one.mask[:, keep], one.template, one.given, one.group, one.examples)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_rows_of_a_batch_decode_as_they_would_alone(temperature: float, remasking: str) -> None:
    policy = small_policy()
    decoder = Decoder(12, 4, 6, temperature, remasking, stop_at_eos=False)
    seeds = torch.tensor([11, 12, 13, 14])
    together = decoder(policy, ragged(), seeds)
    for row in range(4):
        single = decoder(policy, alone(ragged(), row), seeds[row : row + 1])
        assert torch.equal(single.completion_ids[0], together.completion_ids[row])
        assert torch.equal(single.commit_step[0], together.commit_step[row])


def test_seeds_matter() -> None:
    policy = small_policy()
    decoder = Decoder(12, 4, 6, 1.0, stop_at_eos=False)
    first, second = (decoder(policy, ragged(), torch.arange(4) + s) for s in (0, 50))
    assert not torch.equal(first.completion_ids, second.completion_ids)


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
    allowed[policy.mask_id] = -torch.inf
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
    rollout = Decoder(4, 4, 4, remasking="random", stop_at_eos=False)(policy, prompts, torch.arange(n))
    first = (rollout.commit_step == 0).float().mean(0)
    assert torch.allclose(first, torch.full((4,), 0.25), atol=0.04)


def test_commit_steps_keep_the_order_of_blocks_and_the_counts() -> None:
    policy = small_policy()
    rollout = Decoder(12, 5, 6, stop_at_eos=False)(policy, ragged())  # blocks of 5, 5 and 2, 2 steps each
    for start, stop, steps in ((0, 5, (0, 1)), (5, 10, (2, 3)), (10, 12, (4, 5))):
        within = rollout.commit_step[:, start:stop]
        sizes = [-(-(stop - start) // 2), (stop - start) // 2]
        for step, size in zip(steps, sizes, strict=True):
            assert ((within == step).sum(-1) == size).all()


def with_template(given: list[bool], token: int = 9) -> Prompts:
    prompts = open_prompts(torch.full((3, 2), 5), len(given))
    mask = torch.tensor(given).expand(3, -1)
    return Prompts(
        prompts.ids,
        prompts.mask,
        torch.full_like(mask, token, dtype=torch.long),
        mask,
        prompts.group,
        ({},) * 3,
    )


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
    first, second = (
        Decoder(8, 8, 8, stop_at_eos=False)(small_policy(), with_template([True] * 7 + [False], token))
        for token in (9, 20)
    )
    policy = small_policy()
    with torch.no_grad():
        ids = torch.tensor([[5, 5] + [9] * 7 + [policy.mask_id]])
        logits = policy.network.logits(policy.network.hidden(ids))[0, -1]
    logits[policy.mask_id] = -torch.inf
    assert int(first.completion_ids[0, -1]) == int(logits.argmax())
    assert first.completion_ids.shape == second.completion_ids.shape


class Ending(Policy):
    """Proposes EOS at one position of each row and 7 elsewhere."""

    def __init__(self, ends: list[int]) -> None:
        base = small_policy()
        super().__init__(base.network, base.tokenizer)  # type: ignore[arg-type]
        self.ends = torch.tensor(ends)
        self.calls = 0

    def propose(self, tokens, mask, window, temperature, noise):  # type: ignore[no-untyped-def]
        self.calls += 1
        position = torch.arange(window.start, window.stop) - 2
        ids = torch.where(position == self.ends.unsqueeze(-1), self.eos_id, 7)
        return ids, torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))


def decode_ending(ends: list[int], stop: bool) -> tuple[Rollout, int]:
    policy = Ending(ends)
    prompts = open_prompts(torch.full((len(ends), 2), 5), 16)
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


def test_errors() -> None:
    with pytest.raises(ValueError, match="needs seeds, one a row"):
        Decoder(8, 4, 4, 0.9)(small_policy(), ragged())
    with pytest.raises(ValueError, match=r"temperature=-1 is out of range; allowed: a number, 0 or more"):
        Decoder(8, 4, 4, -1)
    assert Decoder(8, 100, 4).block_size == 8
