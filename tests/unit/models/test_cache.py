"""Decoding with cached keys and values, and what the host may wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spg.core.types import Prompts
from spg.models.network import Cache, Positions
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder, logp_difference
from tests.helpers import golden_policy, open_prompts, small_policy
from tests.unit.rollout.test_decoding import alone, ragged

CACHES = ("prefix", "dual")


def grouped(n: int = 2, g: int = 3, t: int = 12) -> Prompts:
    """Return n prompts of unlike length, each g times."""
    ids = torch.randint(5, 28, (n, 7), generator=torch.Generator().manual_seed(4)).repeat_interleave(g, 0)
    mask = torch.arange(7) >= torch.tensor([0, 3]).repeat_interleave(g)[:, None]
    return open_prompts(ids, t, mask)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_refresh_at_every_step_is_exact(cache: str, temperature: float, remasking: str) -> None:
    policy, prompts = small_policy(), grouped()
    exact = Decoder(12, 4, 6, temperature, remasking)(policy, prompts, 3)
    fresh = Decoder(12, 4, 6, temperature, remasking, cache=cache, refresh_every=1)(policy, prompts, 3)
    assert torch.equal(exact.completion_ids, fresh.completion_ids)
    assert torch.equal(exact.commit_step, fresh.commit_step)
    assert torch.allclose(exact.commit_logps, fresh.commit_logps, atol=1e-5)
    stale = Decoder(12, 4, 6, temperature, remasking, cache=cache)(policy, prompts, 3)
    assert not torch.allclose(exact.commit_logps, stale.commit_logps, atol=1e-3), "a cache changes something"


@pytest.mark.parametrize("cache", CACHES)
def test_one_block_with_a_prefix_cache_is_exact_but_for_the_prompt(cache: str) -> None:
    """With one block, everything but the prompt is computed at each step by either cache."""
    policy, prompts = small_policy(), ragged()
    one, other = (Decoder(12, 12, 6, cache=name)(policy, prompts) for name in CACHES)
    assert torch.equal(one.completion_ids, other.completion_ids)
    assert torch.allclose(one.commit_logps, other.commit_logps, atol=1e-6)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("refresh_every", [None, 2])
def test_rows_decode_with_a_cache_as_they_would_alone(cache: str, refresh_every: int | None) -> None:
    policy = small_policy()
    given = torch.zeros(4, 12, dtype=torch.bool)
    given[1, 2:5] = given[2, :4] = given[3, 1:] = True
    prompts = ragged()
    object.__setattr__(prompts, "given", given)
    object.__setattr__(prompts, "template", torch.full((4, 12), 9))
    decoder = Decoder(12, 4, 12, 1.0, stop_at_eos=False, cache=cache, refresh_every=refresh_every)
    together = decoder(policy, prompts, 11)
    for row in range(4):
        single = decoder(policy, alone(prompts, row), 11)
        assert torch.equal(single.completion_ids[0], together.completion_ids[row])
        assert torch.allclose(single.commit_logps[0], together.commit_logps[row], atol=1e-5)


def by_hand(policy: Policy, prompts: Prompts, cache: str, block: int) -> Tensor:
    """Decode greedily one token a step, keys and values taken from a whole pass at each block's start."""
    tokens = torch.cat([prompts.ids, torch.full_like(prompts.template, policy.mask_id)], 1)
    width, length = prompts.ids.shape[1], tokens.shape[1]
    mask = torch.cat([prompts.mask, torch.ones_like(prompts.given)], 1)
    never = [policy.mask_id, policy.pad_id, *range(29, 32)]
    for start in range(width, length, block):
        for row in range(len(tokens)):
            before = tokens[row : row + 1].clone()
            for _ in range(block):
                kept, net = Cache(), policy.network
                net.hidden(before, mask[row : row + 1], None, kept)
                stop = start + block if cache == "dual" else length
                here = tokens[row : row + 1, start:stop]
                states = net.hidden(here, mask[row : row + 1], None, kept, start)[0, :block]
                logits = net.logits(states)
                sure = logits.softmax(-1)
                logits[:, never] = -torch.inf
                best = sure.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)
                best[tokens[row, start : start + block] != policy.mask_id] = -1
                at = int(best.argmax())
                tokens[row, start + at] = logits[at].argmax()
    return tokens[:, width:]


@pytest.mark.parametrize("cache", CACHES)
def test_what_is_cached_is_what_the_blocks_start_saw(cache: str) -> None:
    policy, prompts = small_policy(), ragged()
    with torch.no_grad():
        expected = by_hand(policy, prompts, cache, 4)
    rollout = Decoder(12, 4, 12, stop_at_eos=False, cache=cache)(policy, prompts)
    assert torch.equal(rollout.completion_ids, expected)


def test_with_a_cache_only_the_rest_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    shapes: dict[str, list[tuple[int, ...]]] = {}
    original = policy.network.hidden
    for cache in ("none", *CACHES):
        seen = shapes.setdefault(cache, [])
        monkeypatch.setattr(
            policy.network,
            "hidden",
            lambda ids, *a, seen=seen: seen.append(tuple(ids.shape)) or original(ids, *a),
        )
        Decoder(12, 4, 6, 1.0, stop_at_eos=False, cache=cache)(policy, grouped(), 0)
    assert shapes["none"][0] == shapes["dual"][0] == (2, 19), "the first step of a group is computed once"
    assert shapes["prefix"][1::2] == [(6, 12), (6, 8), (6, 4)]
    assert shapes["dual"][1::2] == [(6, 4)] * 3
    assert [s[1] for s in shapes["none"]] == [19] * 6


def test_rows_that_are_done_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("none", *CACHES):
        policy = small_policy(seed=2)
        with torch.no_grad():
            policy.network.head.weight[policy.eos_id] *= 2.5
        rows: list[int] = []
        original = policy.network.hidden
        monkeypatch.setattr(
            policy.network,
            "hidden",
            lambda ids, *a, rows=rows, hidden=original: rows.append(len(ids)) or hidden(ids, *a),
        )
        prompts = open_prompts(torch.arange(5, 21).unsqueeze(1), 24)
        rollout = Decoder(24, 4, 24, 1.0, cache=cache)(policy, prompts, 0)
        ended = (rollout.completion_ids[:, :4] == policy.eos_id).any(-1)
        assert 0 < int(ended.sum()) < 16
        assert rows[4] == 16 - int(ended.sum()), "in the second block"
        whole = Decoder(24, 4, 24, 1.0, stop_at_eos=False, cache=cache)(policy, prompts, 0)
        mask = rollout.completion_mask
        assert torch.equal(rollout.completion_ids[mask], whole.completion_ids[mask])


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to wait for."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "masked_select",
        "item",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in (args[1] if len(args) > 1 else ()) or ()
        )
        if name in self.NAMES or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["none", *CACHES])
def test_no_step_waits_for_the_device(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where equal rows are looked for before the first step only."""
    policy = small_policy()
    waits: list[list[str]] = []
    original = Decoder._step

    def step(self: Decoder, *args: Any, shared: bool, **more: Any) -> None:
        with Waits() as mode:
            original(self, *args, shared=shared and not waits, **more)
        waits.append(mode.found)

    monkeypatch.setattr(Decoder, "_step", step)
    Decoder(12, 4, 12, 1.0, stop_at_eos=False, cache=cache)(policy, grouped(), 0)
    assert len(waits) == 12
    assert waits[0], "the first one looks for equal rows"
    assert not any(waits[1:])


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "random"])
def test_rollouts_keep_the_log_probabilities_of_their_steps(remasking: str) -> None:
    policy, prompts = small_policy(), ragged()
    rollout = Decoder(12, 4, 6, 1.0, remasking)(policy, prompts, 5)
    for step in range(6):
        at = rollout.commit_step == step
        tokens = rollout.inputs_at(torch.full((4, 1), step), policy.mask_id)[:, 0]
        assert (tokens[:, 7:][at] == policy.mask_id).all()
        exact = policy.token_logps(tokens, rollout.attention_mask, rollout.completion_ids, at)
        assert torch.allclose(exact[at], rollout.commit_logps[at], atol=1e-5)
    assert not rollout.commit_logps[rollout.commit_step < 0].any()


def test_the_difference_is_that_of_the_cached_steps() -> None:
    policy, prompts = golden_policy(), open_prompts(torch.arange(54).view(6, 9), 16)
    for cache in ("none", *CACHES):
        rollout = Decoder(16, 4, 8, 1.0, stop_at_eos=False, cache=cache)(policy, prompts, 1)
        found = logp_difference(policy, rollout, 0)
        if cache == "none":
            assert float(found.max()) < 1e-4
            continue
        assert float(found.mean()) > 1e-3
        every = []
        for step in range(8):
            at = rollout.commit_step == step
            tokens = rollout.inputs_at(torch.full((6, 1), step), policy.mask_id)[:, 0]
            exact = policy.token_logps(tokens, None, rollout.completion_ids, at)
            apart = (exact - rollout.commit_logps).abs().masked_fill(~at, 0).sum(-1) / at.sum(-1)
            every.append(apart.detach())
        assert all(float((torch.stack(every)[:, row] - found[row]).abs().min()) < 1e-5 for row in range(6)), (
            "one of the row's own steps"
        )


def test_a_window_of_the_network_is_that_of_the_whole() -> None:
    network = small_policy().network
    ids = torch.randint(5, 28, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10) >= torch.tensor([[0], [2], [3]])
    with torch.no_grad():
        whole, cache = network.hidden(ids, mask), Cache()
        network.hidden(ids, mask, None, cache)
        part = network.hidden(ids[:, 4:7], mask, None, cache, 4)
        assert torch.allclose(part, whole[:, 4:7], atol=1e-5)
        at = Positions(torch.tensor([[0, 2]] * 3))
        some = network.hidden(ids[:, 4:7], mask, at, cache, 4)
        assert torch.allclose(some, whole[:, [4, 6]].flatten(0, 1), atol=1e-5)
        cache.select(torch.tensor([2, 0]))
        again = network.hidden(ids[[2, 0], 4:7], mask[[2, 0]], None, cache, 4)
        assert torch.allclose(again, whole[[2, 0], 4:7], atol=1e-5)
