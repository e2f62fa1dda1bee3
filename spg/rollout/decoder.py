"""Decoding: fill the holes of a completion step by step, block after block (paper, G.2 and Table 17)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from spg.core.combinations import check_commit_rule
from spg.core.devices import send
from spg.core.rules import Count, NotNegative, Positive, Probability, checked
from spg.core.seeding import Streams
from spg.core.types import Prompts, Rollout
from spg.models.choice import Measure, distinct_rows
from spg.models.guidance import Guidance
from spg.models.network import Cache
from spg.models.policy import Policy
from spg.rollout.schedule import ConfidenceRule, FixedCounts, Schedule, WhileOpen

# by its name in the configuration: the measure that orders the positions, the highest first
CONFIDENCE: dict[str, Measure] = {
    "low_confidence": "probability",
    "margin": "margin",
    "entropy": "negative_entropy",
}


def mask_through_first(hits: Tensor) -> Tensor:
    """Return bool [B T]: True up to and including the first True of `hits` [B T] in each row."""
    return hits.cumsum(-1) - hits.long() == 0


@torch.no_grad()
def logp_difference(policy: Policy, rollout: Rollout, seed: int) -> Tensor:
    """Return by how much a cache changed the log-probabilities of committed tokens.

    One decoding step of each sequence is drawn and computed exactly. The result is the mean of
    |log-probability when the token was committed - exact log-probability| over the tokens committed in that
    step. Without a cache it is 0 up to rounding.

    Args:
        policy: The policy that decoded the completions.
        rollout: B completions.
        seed: Decides which step of a sequence is drawn.

    Returns:
        [B], in nats per token.
    """
    committed = rollout.commit_step >= 0
    keys = Streams(seed, rollout.index).uniform(committed.shape[-1]).masked_fill(~committed, -1.0)
    step = rollout.commit_step.gather(1, keys.argmax(-1, keepdim=True)).squeeze(-1)
    scored = committed & (rollout.commit_step == step.unsqueeze(-1))
    mask = None if bool(rollout.prompt_mask.all()) else rollout.attention_mask
    seen = rollout.inputs_at(step.unsqueeze(1), policy.mask_id).squeeze(1)
    exact = policy.token_logps(seen, mask, rollout.completion_ids, scored)
    difference = (exact - rollout.commit_logps).abs().masked_fill(~scored, 0.0)
    return difference.sum(-1) / scored.sum(-1).clamp_min(1)


def _lead(key: Tensor, picked: Tensor) -> Tensor:
    """Return by how much the least `key` [B W] of picked positions exceeds the largest of the others, [B].

    The result is infinite if no other position is open (their `key` is -inf).
    """
    return key.masked_fill(~picked, torch.inf).amin(-1) - key.masked_fill(picked, -torch.inf).amax(-1)


class Decoder:
    """Decodes blocks from left to right. One block of the full length is full-sequence decoding.

    Args:
        gen_length: Number of completion tokens, T.
        block_size: Number of tokens in a decoding block; the last block may be shorter.
        steps: Decoding steps for the whole completion. Each block gets steps // blocks of them, at least 1,
            as in the released code. Steps in which no row has a token to commit are not computed.
        temperature: 0 is greedy.
        remasking: Which positions a step commits: those whose chosen token has the highest probability
            (`low_confidence`), the largest `margin` to the second token, or the lowest `entropy`; or `random`
            ones.
        stop_at_eos: If true, a row is done when a finished block holds its EOS. The rest becomes EOS, and
            decoding ends when all rows are done.
        near_tie: At temperature 0, count the decisions whose two best alternatives lie no further apart than
            this: in logits for the token of a position that is committed; in units of the confidence for the
            least confident position committed and the most confident one left, and for a confidence and
            the threshold. None does not count.
        cache: `none` computes every position in every step, as in the released code. `prefix` computes all
            of them in the first step of a block, and afterwards the block and what follows it; `dual`
            afterwards the block only. The keys and values of the other positions stay as they were in the
            last full pass, so the samples differ a little (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618).
        refresh_every: Number of steps of a block between full passes; None is one full pass per block, and
            1 is exact.
        threshold: Commit all positions whose confidence, the measure of `remasking`, is above this, and the
            most confident one in any case. A block takes the steps that it needs, and `steps` is not read.
            It needs `low_confidence` or `margin`.
        factor: In place of a threshold: commit the n most confident positions with the largest n for which
            (n + 1) (1 - confidence of the n-th) stays below this; see `ConfidenceRule`.
        cfg_scale: Scale of classifier-free guidance, which chooses and measures tokens by other logits and
            computes twice as many rows; see `Guidance`. `Rollout.commit_logps` stay those of the policy
            itself. 0 is none.
    """

    @checked
    def __init__(
        self,
        gen_length: Count,
        block_size: Count,
        steps: Count,
        temperature: NotNegative = 0.0,
        remasking: Literal["low_confidence", "random", "margin", "entropy"] = "low_confidence",
        stop_at_eos: bool = True,
        near_tie: NotNegative | None = None,
        cache: Literal["none", "prefix", "dual"] = "none",
        refresh_every: Count | None = None,
        threshold: Probability | None = None,
        factor: Positive | None = None,
        cfg_scale: NotNegative = 0.0,
    ) -> None:
        check_commit_rule(remasking, threshold, factor)
        self.gen_length = gen_length
        self.block_size = min(block_size, gen_length)
        self.steps = steps
        self.temperature = temperature
        self.remasking = remasking
        self.stop_at_eos = stop_at_eos
        self.near_tie = near_tie if temperature == 0 else None  # a random draw has no best alternative
        self.cache = cache
        self.refresh_every = refresh_every
        self.threshold = threshold
        self.factor = factor
        self.cfg_scale = cfg_scale

    @property
    def rule(self) -> ConfidenceRule | None:
        """How the confidence decides the number of tokens that a step commits; None if `steps` decides."""
        if self.threshold is None and self.factor is None:
            return None
        return ConfidenceRule(self.threshold, self.factor)

    def __call__(self, policy: Policy, prompts: Prompts, seed: int | None = None) -> Rollout:
        """Complete B prompts.

        Args:
            policy: Proposes tokens.
            prompts: B prompts with their templates.
            seed: Random draws derive from (seed, prompts.index), so that other rows of the batch change
                nothing.

        Raises:
            ValueError: if randomness is needed and the seed is missing.
        """
        if self.temperature > 0 or self.remasking == "random":
            if seed is None:
                raise ValueError("decoding at temperature > 0 or with remasking=random needs a seed")
            return self._decode(policy, prompts, Streams(seed, prompts.index))
        # equal prompts have equal completions
        parts = (2 * prompts.ids + prompts.mask, 2 * prompts.template + prompts.given)
        first, which = distinct_rows(torch.cat(parts, dim=1))
        if len(first) == len(which):
            return self._decode(policy, prompts, None)
        done = self._decode(policy, prompts.select(first), None).select(which)
        return replace(done, group=prompts.group, index=prompts.index, examples=prompts.examples)

    def _decode(self, policy: Policy, prompts: Prompts, streams: Streams | None) -> Rollout:
        """Complete prompts.

        The host counts the holes, so it waits for the device once per block. If the confidence decides the
        number of tokens, it waits once per step.
        """
        batch, width = prompts.ids.shape
        blocks = [
            slice(start, min(start + self.block_size, self.gen_length))
            for start in range(0, self.gen_length, self.block_size)
        ]
        holes, padded = _counts(prompts, blocks)
        state = _State.of_prompts(prompts, policy.mask_id, padded)
        schedule = self._schedule(holes, state, blocks)
        tokens_noise, order_noise = self._noise(streams, len(blocks) * schedule.steps)
        cache = None if self.cache == "none" else Cache()
        active = list(range(batch))
        fresh = True  # before the first step all completions of a prompt are equal

        for number, block in enumerate(blocks):
            window = slice(width + block.start, width + block.stop)
            seen = window if self.cache == "dual" else slice(window.start, width + self.gen_length)
            for taken, turn in enumerate(schedule.turns(number, active, together=cache is not None)):
                at = number * schedule.steps + turn.step
                part = _Rows(turn.rows, batch, prompts.ids.device)
                if cache is not None and taken % (self.refresh_every or schedule.steps) == 0:
                    cache.clear()
                self._step(
                    policy,
                    state,
                    part,
                    block,
                    at,
                    None if turn.counts is None else part.tensor(turn.counts),
                    turn.left,
                    [None if n is None else part(n[:, at]) for n in (tokens_noise, order_noise)],
                    shared=fresh or prompts.ids.device.type == "cpu",
                    cache=cache,
                    seen=seen,
                )
                fresh = False
            if self.stop_at_eos and number + 1 < len(blocks):
                ended = (state.tokens[:, window] == policy.eos_id).any(-1)
                rest = state.tokens[:, window.stop :]
                rest.masked_fill_(ended.unsqueeze(-1) & ~prompts.given[:, block.stop :], policy.eos_id)
                over = ended.tolist()
                active = [row for row in active if not over[row]]
                if not active:
                    break
        return state.rollout(policy, prompts)

    def _schedule(self, holes: Tensor, state: _State, blocks: Sequence[slice]) -> Schedule:
        if self.rule is not None:
            return WhileOpen(holes, state.open, blocks)
        return FixedCounts(holes, max(1, self.steps // len(blocks)))

    def _step(
        self,
        policy: Policy,
        state: _State,
        part: _Rows,
        block: slice,
        at: int,
        counts: Tensor | None,
        left: int,
        noise: Sequence[Tensor | None],
        *,
        shared: bool,
        cache: Cache | None,
        seen: slice,
    ) -> None:
        """Commit tokens of a block in the rows of `part`, of at most `left` holes each.

        Their numbers are `counts` [N 1]; if it is None, the confidence decides.
        """
        first = state.tokens.shape[1] - self.gen_length + block.start
        window = slice(first, first + block.stop - block.start)
        remaining = part(state.open[:, block])
        columns = remaining.byte().argsort(dim=-1, descending=True, stable=True)[:, :left]
        live = remaining.gather(1, columns)
        draw, order = (None if n is None else n.gather(1, columns) for n in noise)
        measures = self._measures()
        ids, *measured = policy.propose(
            part(state.tokens),
            None if state.mask is None else part(state.mask),
            columns + window.start,
            self.temperature,
            draw,
            measures,
            shared=shared,
            cache=cache,
            window=seen,
            guidance=Guidance(self.cfg_scale, part(state.known)) if self.cfg_scale > 0 else None,
        )
        key = (measured[0] if order is None else order).masked_fill(~live, -torch.inf)
        if counts is None:
            assert self.rule is not None
            counts = self.rule.counts(key)
        rank = key.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        picked = live & (rank < counts)
        if self.near_tie is not None:
            ties = ((measured[-1] <= self.near_tie) & picked).sum(-1)
            ties = ties + self._ties_of_order(key, picked, order is not None)
            part.put(state.near_ties, part(state.near_ties) + ties)
        probability = measured[measures.index(self._kept)]
        logps = probability.clamp_min(torch.finfo(torch.float32).tiny).log()
        for whole, values in (
            (state.tokens[:, window], ids),
            (state.commit_step[:, block], torch.full_like(ids, at)),
            (state.commit_logps[:, block], logps),
            (state.open[:, block], torch.zeros_like(picked)),
        ):
            before = part(whole)
            part.put(
                whole, before.scatter(1, columns, torch.where(picked, values, before.gather(1, columns)))
            )

    def _ties_of_order(self, key: Tensor, picked: Tensor, random: bool) -> Tensor:
        """Return how many decisions on which positions to commit are near ties, [N]."""
        assert self.near_tie is not None
        if random:
            return torch.zeros_like(picked[:, 0], dtype=torch.long)
        close = _lead(key, picked) <= self.near_tie
        if self.rule is None:
            return close.long()
        return self.rule.close_calls(key, self.near_tie).maximum(close.long())

    @property
    def _kept(self) -> Measure:
        """The probability of a committed token that a rollout keeps: that of the policy itself."""
        return "unguided_probability" if self.cfg_scale > 0 else "probability"

    def _measures(self) -> list[Measure]:
        measures: list[Measure] = [CONFIDENCE.get(self.remasking, "probability")]
        if self._kept not in measures:
            measures.append(self._kept)
        if self.near_tie is not None:
            measures.append("lead")
        return measures

    def _noise(self, streams: Streams | None, steps: int) -> tuple[Tensor | None, Tensor | None]:
        """Draw uniform numbers [B S W] for the tokens and for the order, where each is random."""
        wanted = (self.temperature > 0, self.remasking == "random")
        tokens, order = (
            streams.uniform(steps, self.block_size, dtype=torch.double) if want and streams else None
            for want in wanted
        )
        return tokens, order


@dataclass
class _State:
    """Completions while they are decoded."""

    tokens: Tensor  # [B L]
    mask: Tensor | None  # [B L] True at real tokens; None if nothing is padded
    known: Tensor  # [B L] tokens that are there before the first step
    open: Tensor  # [B T] holes that are still to fill
    commit_step: Tensor  # [B T]
    commit_logps: Tensor  # [B T]
    near_ties: Tensor  # [B]

    @classmethod
    def of_prompts(cls, prompts: Prompts, mask_id: int, padded: bool) -> _State:
        """Return the state before the first step; `padded` says whether any prompt has padding."""
        completion = prompts.template.masked_fill(~prompts.given, mask_id)
        mask = None
        if padded:
            mask = torch.cat([prompts.mask, torch.ones_like(prompts.given)], dim=-1)
        return cls(
            tokens=torch.cat([prompts.ids, completion], dim=-1),
            mask=mask,
            known=torch.cat([torch.ones_like(prompts.mask), prompts.given], dim=-1),
            open=~prompts.given,
            commit_step=torch.full_like(completion, -1),
            commit_logps=torch.zeros(completion.shape, device=completion.device),
            near_ties=torch.zeros_like(prompts.index),
        )

    def rollout(self, policy: Policy, prompts: Prompts) -> Rollout:
        """Return the completions as they are now."""
        completion = self.tokens[:, prompts.ids.shape[1] :]
        return Rollout(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            completion_ids=completion,
            completion_mask=mask_through_first(completion == policy.eos_id),
            given=prompts.given,
            group=prompts.group,
            index=prompts.index,
            commit_step=self.commit_step,
            commit_logps=self.commit_logps,
            near_ties=self.near_ties,
            texts=policy.texts(completion),
            examples=prompts.examples,
        )


def _counts(prompts: Prompts, blocks: Sequence[slice]) -> tuple[Tensor, bool]:
    """Return the holes of each block [B blocks], on the CPU, and whether any prompt has padding.

    The device is waited for once.
    """
    holes = [(~prompts.given[:, block]).sum(-1) for block in blocks]
    counts = torch.stack([*holes, (~prompts.mask).sum(-1)], dim=1).cpu()
    return counts[:, :-1], bool(counts[:, -1].any())


class _Rows:
    """Some rows of a batch: reads and writes them in tensors [B ...], without waiting for the device."""

    def __init__(self, rows: Sequence[int], batch: int, device: torch.device) -> None:
        self.device = device
        self._index = None if len(rows) == batch else self.tensor(rows)

    def __call__(self, whole: Tensor) -> Tensor:
        """Return the rows of `whole` [B ...]."""
        return whole if self._index is None else whole[self._index]

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Write `values` [N ...] to the rows of `whole` [B ...]."""
        if self._index is None:
            whole.copy_(values)
        else:
            whole[self._index] = values

    def tensor(self, numbers: Sequence[Any]) -> Tensor:
        """Return numbers as a tensor on the device."""
        return send(torch.tensor(numbers), self.device)
