"""Classifier-free guidance in decoding, as in the released code of LLaDA."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from spg.core.seeding import Streams
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder, logp_difference
from tests.helpers import columns, golden_policy, open_prompts, small_policy
from tests.unit.rollout.test_decoding import alone, ragged
from tests.unit.rollout.test_threshold import CACHES, golden_prompts, slowly


def by_the_released_rule(
    policy: Policy, ids: Tensor, length: int, block: int, steps: int, scale: float, noise: Tensor | None
) -> Tensor:
    """Decode one prompt [1 P] with equally many tokens a step; return the tokens [T]."""
    x = torch.cat([ids, torch.full((1, length), policy.mask_id)], 1)
    prompt = x != policy.mask_id
    count = length // steps
    for step in range(steps):
        start = ids.shape[1] + step * count // block * block
        blank = x.clone()
        blank[prompt] = policy.mask_id
        logits, without = policy.network.logits(policy.network.hidden(torch.cat([x, blank]))).chunk(2)
        guided = (without + (scale + 1) * (logits - without))[0, start : start + block]
        p = guided.softmax(-1)
        guided[:, policy.mask_id] = -torch.inf
        chosen = guided.argmax(-1)
        if noise is not None:
            sums = guided.double().softmax(-1).cumsum(-1)
            chosen = (sums <= noise[step].unsqueeze(-1) * sums[:, -1:]).sum(-1)
        sure = p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        sure[x[0, start : start + block] != policy.mask_id] = -torch.inf
        best = sure.topk(count).indices
        x[0, start + best] = chosen[best]
    return x[0, ids.shape[1] :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_rows_are_decoded_as_by_the_released_rule(scale: float, temperature: float) -> None:
    policy, prompts = golden_policy(), golden_prompts()
    decoder = Decoder(16, 8, 8, temperature, stop_at_eos=False, cfg_scale=scale)
    rollout = decoder(policy, prompts, 2)
    plain = Decoder(16, 8, 8, temperature, stop_at_eos=False)(policy, prompts, 2)
    for row in range(3):
        one = alone(prompts, row)
        noise = Streams(2, one.index).uniform(8, 8, dtype=torch.double)[0] if temperature else None
        with torch.no_grad():
            expected = by_the_released_rule(policy, one.ids, 16, 8, 8, scale, noise)
        assert torch.equal(rollout.completion_ids[row], expected), "padding is not seen by either copy"
    assert not torch.equal(rollout.completion_ids, plain.completion_ids)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", [{"threshold": 1.0}, {"threshold": 0.2}, {"factor": 2.0}], ids=str)
def test_given_tokens_are_masked_too_with_every_cache_and_rule(cache: str, rule: dict[str, Any]) -> None:
    policy, prompts = golden_policy(), golden_prompts()
    given = torch.zeros(3, 16, dtype=torch.bool)
    given[1, 3:7] = given[2, 8:] = True
    prompts = dataclasses.replace(prompts, given=given, template=torch.full((3, 16), 9))
    rollout = Decoder(16, 6, 1, 0.7, stop_at_eos=False, cache=cache, cfg_scale=1.5, **rule)(
        policy, prompts, 4
    )
    for row in range(3):
        with torch.no_grad():
            tokens, steps, logps = slowly(
                policy, prompts, row, 6, temperature=0.7, cache=cache, seed=4, scale=1.5, **rule
            )
        assert torch.equal(rollout.completion_ids[row], tokens)
        assert torch.equal(rollout.commit_step[row], steps)
        assert torch.allclose(rollout.commit_logps[row], logps, atol=1e-4), "those without guidance"


@pytest.mark.parametrize("cache", CACHES)
def test_log_probabilities_stay_those_of_the_policy(cache: str) -> None:
    policy, prompts = golden_policy(), open_prompts(torch.arange(54).view(6, 9), 16)
    rollout = Decoder(16, 4, 8, 1.0, stop_at_eos=False, cache=cache, cfg_scale=2.0)(policy, prompts, 1)
    found = float(logp_difference(policy, rollout, 0).mean())
    assert found < 1e-4 if cache == "none" else found > 1e-3


def test_without_guidance_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    rows: dict[float, list[int]] = {}
    original = policy.network.hidden
    for scale in (0.0, 1.0):
        seen = rows.setdefault(scale, [])
        monkeypatch.setattr(
            policy.network, "hidden", lambda ids, *a, seen=seen: seen.append(len(ids)) or original(ids, *a)
        )
        Decoder(12, 4, 6, 1.0, stop_at_eos=False, cfg_scale=scale)(policy, ragged(), 0)
    assert rows[0.0] == [4] * 6
    assert rows[1.0] == [8] * 6


def test_what_an_unguided_policy_finds_is_measured_too() -> None:
    policy = golden_policy()
    prompts = golden_prompts()
    tokens = torch.cat([prompts.ids, torch.full((3, 4), policy.mask_id)], 1)
    where = columns(tokens, 9, 13)
    measures = ("probability", "unguided_probability", "negative_entropy")
    ids, *plain = policy.propose(tokens, None, where, 0.0, None, measures)
    assert torch.equal(plain[0], plain[1])
    with torch.no_grad():
        logits = policy.network.logits(policy.network.hidden(tokens)[:, 9:])
    assert torch.allclose(plain[1], logits.softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1), atol=1e-6)


def test_a_negative_scale_is_refused() -> None:
    message = "cfg_scale=-1 is out of range; allowed: a number, 0 or more"
    with pytest.raises(ValueError, match=re.escape(message)):
        Decoder(8, 4, 4, cfg_scale=-1)
