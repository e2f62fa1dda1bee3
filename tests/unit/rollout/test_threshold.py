"""Decoding that commits as many tokens in a step as the confidence allows (Fast-dLLM)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from spg import config
from spg.algorithms.masking import Trajectory
from spg.core.seeding import Streams
from spg.core.types import Experience, Prompts, Rollout
from spg.core.world import World
from spg.models.network import Cache
from spg.models.policy import Policy
from spg.rollout.collect import CollectionStats
from spg.rollout.decoder import Decoder, logp_difference
from spg.rollout.schedule import ConfidenceRule
from spg.training.metrics import rollout_metrics
from tests.helpers import golden_policy, open_prompts, rollout_of, small_policy
from tests.unit.models.test_cache import Waits, grouped
from tests.unit.rollout.test_decoding import alone, from_table, ragged, table_policy

CACHES = ("none", "prefix", "dual")
RULES: tuple[dict[str, float], ...] = ({"threshold": 0.3}, {"threshold": 0.06}, {"factor": 2.0})


def golden_prompts() -> Prompts:
    """Three prompts of the golden network, of 9, 7 and 4 tokens."""
    ids = torch.randint(0, 119, (3, 9), generator=torch.Generator().manual_seed(8))
    return open_prompts(ids, 16, torch.arange(9) >= torch.tensor([[0], [2], [5]]))


def number_to_commit(confidences: list[float], threshold: float | None, factor: float | None) -> int:
    """Return how many of the open positions Fast-dLLM's decoders commit, one position after the other."""
    best = sorted(confidences, reverse=True)
    if threshold is not None:
        return max(1, sum(c > threshold for c in best))
    assert factor is not None
    reached = 0
    for place, c in enumerate(best):
        reached = place
        if place > 0 and c < 1 - factor / (place + 2):
            break
    return reached + 1 if reached in (0, len(best) - 1) else reached


def states_of(policy: Policy, ids: Tensor, cache: Cache | None, window: slice) -> Tensor:
    """Return the states of one row [L D], or zeros where a filled cache stands for the positions."""
    if cache is None or not cache.filled:
        return policy.network.hidden(ids, None, None, cache)[0]
    part = policy.network.hidden(ids[:, window], None, None, cache, window.start)[0]
    states = torch.zeros(ids.shape[1], part.shape[1])
    states[window] = part
    return states


def slowly(
    policy: Policy,
    prompts: Prompts,
    row: int,
    block: int,
    *,
    threshold: float | None = None,
    factor: float | None = None,
    temperature: float = 0.0,
    cache: str = "none",
    seed: int = 0,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode one row by itself, position by position; return tokens, steps and log-probabilities [T].

    With a scale of guidance the row is computed a second time, with all that is known beforehand masked.
    """
    one = alone(prompts, row)
    width, length = one.ids.shape[1], one.given.shape[1]
    tokens = [*one.ids[0].tolist()]
    for token, given in zip(one.template[0].tolist(), one.given[0].tolist(), strict=True):
        tokens.append(token if given else policy.mask_id)
    known = torch.tensor([token != policy.mask_id for token in tokens])
    blocks = -(-length // block)
    noise = Streams(seed, one.index).uniform(blocks * block, block, dtype=torch.double)[0]
    steps, logps = torch.full((length,), -1), torch.zeros(length)
    never = [policy.mask_id, policy.pad_id, *range(len(policy.tokenizer), policy.network.head_width)]
    if policy.pad_id == policy.eos_id:
        never.remove(policy.pad_id)
    for number, start in enumerate(range(0, length, block)):
        stop = min(start + block, length)
        unfilled = [p for p in range(start, stop) if not one.given[0, p]]
        window = slice(width + start, width + (stop if cache == "dual" else length))
        caches = [None, None] if cache == "none" else [Cache(), Cache()]
        step = number * block
        while unfilled:
            ids = torch.tensor([tokens])
            states = states_of(policy, ids, caches[0], window)
            blank = states_of(policy, ids.masked_fill(known, policy.mask_id), caches[1], window)
            chosen: dict[int, tuple[float, int]] = {}
            own: dict[int, float] = {}
            for p in unfilled:
                logits = policy.network.logits(states[width + p])
                plain = logits.log_softmax(-1)
                if scale > 0:
                    without = policy.network.logits(blank[width + p])
                    logits = without + (scale + 1) * (logits - without)
                allowed = logits.clone().double()
                allowed[never] = -torch.inf
                token = int(allowed.argmax())
                if temperature > 0:
                    sums = (allowed / temperature).softmax(-1).cumsum(-1)
                    token = int((sums <= noise[step, p - start] * sums[-1]).sum())
                chosen[p] = (float(logits.softmax(-1)[token]), token)
                own[p] = float(plain[token])
            count = number_to_commit([c for c, _ in chosen.values()], threshold, factor)
            for p in sorted(unfilled, key=lambda p: -chosen[p][0])[:count]:
                tokens[width + p] = chosen[p][1]
                steps[p], logps[p] = step, own[p]
                unfilled.remove(p)
            step += 1
    return torch.tensor(tokens[width:]), steps, logps


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_are_decoded_as_by_a_loop_over_rows_and_positions(
    rule: dict[str, float], cache: str, temperature: float
) -> None:
    policy, prompts = golden_policy(), golden_prompts()
    given = torch.zeros(3, 16, dtype=torch.bool)
    given[1, 3:7] = given[2, 8:] = True
    prompts = dataclasses.replace(prompts, given=given, template=torch.full((3, 16), 9))
    decoder = Decoder(16, 6, 1, temperature, stop_at_eos=False, cache=cache, **rule)
    rollout = decoder(policy, prompts, 4)
    for row in range(3):
        with torch.no_grad():
            tokens, steps, logps = slowly(
                policy, prompts, row, 6, temperature=temperature, cache=cache, seed=4, **rule
            )
        assert torch.equal(rollout.completion_ids[row], tokens)
        assert torch.equal(rollout.commit_step[row], steps)
        assert torch.allclose(rollout.commit_logps[row], logps, atol=1e-4)
    taken = [len(row[row >= 0].unique()) for row in rollout.commit_step]
    holes = (~given).sum(-1).tolist()
    assert any(steps < n for steps, n in zip(taken, holes, strict=True)), "some steps commit several tokens"
    assert len(set(taken)) > 1, "rows need unlike numbers of steps"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", [{"threshold": 1.0}, {"threshold": 0.0}, {"factor": 1e9}], ids=str)
def test_the_limits_are_those_of_the_fixed_schedule(
    rule: dict[str, float], cache: str, temperature: float
) -> None:
    """One token a step, and a block in one step."""
    policy, prompts = small_policy(), grouped()
    steps = 12 if rule.get("threshold") == 1.0 else 3
    fixed = Decoder(12, 4, steps, temperature, cache=cache)(policy, prompts, 3)
    ours = Decoder(12, 4, 7, temperature, cache=cache, **rule)(policy, prompts, 3)
    scale = 4 if steps == 3 else 1  # step 0 of block b is number 4 b with four steps a block
    assert torch.equal(
        ours.commit_step, fixed.commit_step.where(fixed.commit_step < 0, fixed.commit_step * scale)
    )
    if temperature == 0 or steps == 12:  # else other numbers are drawn from the streams
        assert torch.equal(ours.completion_ids, fixed.completion_ids)
        assert torch.equal(ours.commit_logps, fixed.commit_logps)


def test_a_small_factor_leaves_the_last_two_of_a_block_together() -> None:
    """As in the released code, which commits the last open position with all others."""
    rollout = Decoder(12, 4, 1, factor=1e-9, stop_at_eos=False)(small_policy(), ragged())
    for start in (0, 4, 8):
        steps = rollout.commit_step[:, start : start + 4].sort(-1).values
        assert (steps == start + torch.tensor([0, 1, 2, 2])).all()


def committed_by(rule: dict[str, Any], *confidences: float) -> list[int]:
    """Return the step in which each of some positions is committed whose confidence never changes."""
    policy = table_policy([[[c, *[(1 - c) / 3] * 3] for c in confidences]])
    rollout: Rollout = from_table(policy, 1, 1, len(confidences), **rule)
    return rollout.commit_step[0].tolist()


def test_what_a_threshold_commits() -> None:
    assert committed_by({"threshold": 0.8}, 0.5, 0.9, 0.6, 0.85, 0.7) == [3, 0, 2, 0, 1]
    assert committed_by({"threshold": 0.4}, 0.5, 0.9, 0.6) == [0, 0, 0]
    assert committed_by({"threshold": 0.95}, 0.5, 0.9, 0.6) == [2, 0, 1]


def test_what_a_threshold_of_the_margin_commits() -> None:
    """Of two positions with the same probability, the one with a clear lead."""
    policy = table_policy([[[0.6, 0.4], [0.6, 0.2, 0.2], [0.6, 0.1, 0.1, 0.1, 0.1]]])
    for threshold, expected in ((0.3, [1, 0, 0]), (0.45, [2, 1, 0]), (0.1, [0, 0, 0])):
        rollout = from_table(policy, 1, 1, 3, remasking="margin", threshold=threshold)
        assert rollout.commit_step[0].tolist() == expected
    by_probability = from_table(policy, 1, 1, 3, threshold=0.55)
    assert by_probability.commit_step[0].tolist() == [0, 0, 0]


def test_what_a_factor_commits() -> None:
    """Factor 1 asks for 2/3 at the second position, 3/4 at the third, 4/5 at the fourth."""
    assert committed_by({"factor": 1.0}, 0.9, 0.7, 0.74, 0.6, 0.5) == [0, 1, 0, 2, 2]
    assert committed_by({"factor": 1.0}, 0.9, 0.85, 0.82, 0.7, 0.6) == [0, 0, 0, 1, 1]
    assert committed_by({"factor": 2.0}, 0.9, 0.4, 0.7, 0.3, 0.2) == [0, 1, 0, 2, 2], "1/3 and 1/2"
    g = torch.Generator().manual_seed(0)
    for factor in (0.3, 1.0, 1.7):
        for size in (1, 2, 3, 7):
            values = torch.rand(50, size, generator=g) ** 0.2
            expected = [number_to_commit(row.tolist(), None, factor) for row in values]
            assert ConfidenceRule(factor=factor).counts(values).flatten().tolist() == expected


def test_positions_that_are_not_open_do_not_count() -> None:
    key = torch.tensor([[-torch.inf, 0.9, 0.6, 0.95], [0.2, -torch.inf, -torch.inf, -torch.inf]])
    assert ConfidenceRule(threshold=0.8).counts(key).tolist() == [[2], [1]]
    assert ConfidenceRule(factor=0.5).counts(key).tolist() == [[2 + 1], [1]], "two, so the last one too"
    assert ConfidenceRule(factor=0.1).counts(key).tolist() == [[1], [1]]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES[1:], ids=str)
def test_rows_of_a_batch_decode_as_they_would_alone(cache: str, rule: dict[str, float]) -> None:
    policy, prompts = golden_policy(), golden_prompts()
    policy.eos_id = 9  # a token that the random network likes
    decoder = Decoder(16, 6, 1, 0.8, cache=cache, **rule)
    together = decoder(policy, prompts, 11)
    for row in range(3):
        single = decoder(policy, alone(prompts, row), 11)
        assert torch.equal(single.completion_ids[0], together.completion_ids[row])
        assert torch.equal(single.commit_step[0], together.commit_step[row])


def test_rows_that_are_done_with_a_block_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = golden_policy()
    sizes: dict[str, list[int]] = {cache: [] for cache in CACHES}
    original = policy.propose
    for cache in CACHES:
        monkeypatch.setattr(
            policy,
            "propose",
            lambda tokens, *a, cache_name=cache, **k: (
                sizes[cache_name].append(len(tokens)) or original(tokens, *a, **k)
            ),
        )
        rollout = Decoder(16, 8, 1, threshold=0.3, stop_at_eos=False, cache=cache)(policy, golden_prompts())
        steps = [[len(part.unique()) for part in row.split(8)] for row in rollout.commit_step]
        slowest = torch.tensor(steps).amax(0)
        assert len(sizes[cache]) == int(slowest.sum()), "as many steps as the slowest row of each block needs"
        assert sum(sizes[cache]) == (
            int(torch.tensor(steps).sum()) if cache == "none" else 3 * int(slowest.sum())
        )


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_waits_for_the_device_once(cache: str) -> None:
    """Once each step, and twice for a rollout: the holes are counted, and ids are read as texts."""
    policy, prompts = golden_policy(), golden_prompts()
    waits = []
    original = Decoder._step

    def step(self: Decoder, *args: Any, shared: bool, **more: Any) -> None:
        original(self, *args, shared=False, **more)

    decoder = Decoder(16, 4, 1, 0.8, threshold=0.06, stop_at_eos=False, cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_step", step)
        patch.setattr(Tensor, "tolist", lambda t, read=Tensor.tolist: waits.append(t) or read(t))
        with Waits() as mode:
            rollout = decoder(policy, prompts, 0)
    texts = len(prompts.ids)
    steps = len(rollout.commit_step.unique())
    assert len(waits) == steps + 1 + texts
    assert mode.found == ["is_nonzero", "_local_scalar_dense"][-len(mode.found) :], "whether there is padding"


def test_a_rollout_keeps_what_the_policy_saw_in_each_step() -> None:
    policy, prompts = golden_policy(), golden_prompts()
    rollout = Decoder(16, 6, 1, 0.8, threshold=0.06)(policy, prompts, 3)
    assert float(logp_difference(policy, rollout, 0).max()) < 1e-4
    samples = Trajectory()(rollout, policy.mask_id, 0)
    region = rollout.holes
    assert torch.equal(samples.scored.sum(1), region.long()), "each token in the step that committed it"
    assert samples.tokens.shape[1] == max(len(row[row >= 0].unique()) for row in rollout.commit_step * region)
    for draw in range(samples.tokens.shape[1]):
        scored = samples.scored[:, draw]
        mask = rollout.attention_mask
        with torch.no_grad():
            exact = policy.token_logps(samples.tokens[:, draw], mask, rollout.completion_ids, scored)
        assert torch.allclose(exact[scored], rollout.commit_logps[scored], atol=1e-4)


def test_near_ties_of_a_threshold_are_confidences_close_to_it() -> None:
    def ties(rule: dict[str, Any], *confidences: float) -> int:
        policy = table_policy([[[c, *[(1 - c) / 3] * 3] for c in confidences]])
        return int(from_table(policy, 1, 1, len(confidences), near_tie=1e-3, **rule).near_ties)

    assert ties({"threshold": 0.8}, 0.9, 0.85, 0.83) == 0
    assert ties({"threshold": 0.8}, 0.9, 0.8005, 0.83) == 1, "another step would commit it"
    assert ties({"threshold": 0.8}, 0.9, 0.7995) == 1
    assert ties({"threshold": 0.8}, 0.8005, 0.7) == 0, "the most confident one is committed in any case"
    assert ties({"threshold": 0.95}, 0.7, 0.7005) == 1, "which of two comes first"
    assert ties({"factor": 1.0}, 0.9, 0.6671, 0.4, 0.3) == 1
    assert ties({"factor": 1.0}, 0.9, 0.6671) == 0, "the last one is committed in any case"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "out of range; allowed: a number from 0 to 1, or null"),
        ({"factor": 0}, "out of range; allowed: a number above 0, or null"),
        ({"threshold": 0.9, "factor": 1.0}, "two rules for the same thing; give one of the two"),
        ({"threshold": 0.9, "remasking": "entropy"}, "needs a confidence between 0 and 1"),
        ({"factor": 1.0, "remasking": "random"}, "give decoding.remasking=low_confidence or margin"),
    ],
)
def test_rules_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(8, 4, 4, **settings)
    lines = [f"decoding.{name}={value}" for name, value in settings.items()]
    if "threshold" not in settings or "remasking" in settings:  # composing takes a while
        with pytest.raises(config.ConfigError, match=message):
            config.compose("config", lines)


@pytest.mark.parametrize("command", ["config", "evaluate"])
def test_steps_that_are_not_read_are_noted(command: str) -> None:
    lines = ["decoding.steps=6", "decoding.threshold=0.9"]
    cfg = config.compose_unchecked(command, lines)
    assert any("decoding.steps=6 is not read" in line for line in config.notes(cfg, lines))
    assert not config.notes(cfg, lines[1:])
    assert not config.notes(config.compose_unchecked(command, lines[:1]), lines[:1])


def test_a_rollout_s_metrics_say_what_it_saved() -> None:
    """As columns that runs without a threshold do not have."""
    rollout = rollout_of(torch.ones(3, 4, dtype=torch.bool))
    steps = torch.tensor([[0, 0, 2, -1], [0, 1, 2, 3], [0, 0, 0, 0]])
    rollout = dataclasses.replace(rollout, commit_step=steps)
    assert rollout.steps_taken.tolist() == [2, 4, 1]
    experience = Experience(rollout, torch.ones(3), {"all": torch.ones(3)}, torch.zeros(3))
    found, plain = (
        rollout_metrics(experience, CollectionStats(1.0, 1.0, torch.tensor(11), None, taken), 3, 0, World())
        for taken in (rollout.steps_taken, None)
    )
    assert found.keys() - plain.keys() == {"sampling/steps", "sampling/tokens_per_step"}
    assert found["sampling/steps"] == pytest.approx(7 / 3)
    assert found["sampling/tokens_per_step"] == pytest.approx(11 / 7)
