"""Decoding: fill a completion's holes step by step, block after block (paper, G.2 and Table 17)."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.limits import check_limits
from spg.policy import Measure, Policy
from spg.seeding import Streams
from spg.types import Prompts, Rollout

# by its name in the configuration, what the positions are ordered by, the highest first
CONFIDENCE: dict[str, Measure] = {
    "low_confidence": "probability",
    "margin": "margin",
    "entropy": "negative_entropy",
}


def transfer_counts(holes: Tensor, steps: int) -> Tensor:
    """Spread `holes` [B] over `steps` as evenly as whole numbers allow, the rest first; [B steps]."""
    base, rest = holes // steps, holes % steps
    return base.unsqueeze(-1) + (torch.arange(steps, device=holes.device) < rest.unsqueeze(-1))


def through_first(hits: Tensor) -> Tensor:
    """Return bool [B T]: True up to and including the first True of `hits` [B T] in each row."""
    return hits.cumsum(-1) - hits.long() == 0


def _lead(key: Tensor, picked: Tensor) -> Tensor:
    """Return by how much the least of `key` [B W] at `picked` positions exceeds the largest elsewhere [B].

    Infinite where nothing is left elsewhere, that is where `key` is -inf there.
    """
    return key.masked_fill(~picked, torch.inf).amin(-1) - key.masked_fill(picked, -torch.inf).amax(-1)


class Decoder:
    """Decodes blocks from left to right; one block of the full length is full-sequence decoding.

    gen_length: completion tokens T. block_size: of the decoding blocks (the last may be shorter).
    steps: for the whole completion, shared out evenly: steps // blocks for each, at least 1, as
    released; steps in which no row has a token to commit are not computed. temperature: 0 is greedy.
    remasking: each step commits the positions of highest confidence, by the chosen token's probability
    (`low_confidence`), the `margin` between the two likeliest or the lowest `entropy`; or `random` ones.
    stop_at_eos: a row is done when a finished block holds its EOS, the rest becomes EOS, and decoding
    ends when all rows are done. near_tie: at temperature 0, count the decisions whose two best
    alternatives lie no further apart: of the token at a position being committed, in logits; of the
    positions, between the least confident one committed and the most confident one left, in the units
    of the confidence. None does not count.
    """

    def __init__(
        self,
        gen_length: int,
        block_size: int,
        steps: int,
        temperature: float = 0.0,
        remasking: str = "low_confidence",
        stop_at_eos: bool = True,
        near_tie: float | None = None,
    ) -> None:
        check_limits(gen_length=gen_length, block_size=block_size, steps=steps)
        check_limits(temperature=temperature, remasking=remasking, stop_at_eos=stop_at_eos)
        check_limits(near_tie=near_tie)
        self.gen_length = gen_length
        self.block_size = min(block_size, gen_length)
        self.steps = steps
        self.temperature = temperature
        self.remasking = remasking
        self.stop_at_eos = stop_at_eos
        self.near_tie = near_tie if temperature == 0 else None  # a draw has no best alternative

    def __call__(self, policy: Policy, prompts: Prompts, seed: int | None = None) -> Rollout:
        """Complete B prompts.

        seed: random draws derive from (seed, prompts.index), so that the rows beside a row change
        nothing. Raises ValueError where randomness is needed and the seed is missing.
        """
        batch, width = prompts.ids.shape
        completion = prompts.template.masked_fill(~prompts.given, policy.mask_id)
        tokens = torch.cat([prompts.ids, completion], dim=-1)
        mask = None
        if not bool(prompts.mask.all()):
            mask = torch.cat([prompts.mask, torch.ones_like(prompts.given)], dim=-1)
        commit_step = torch.full_like(completion, -1)
        near_ties = torch.zeros_like(prompts.index)
        done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        starts = range(0, self.gen_length, self.block_size)
        steps = max(1, self.steps // len(starts))
        measures: list[Measure] = [] if self.remasking == "random" else [CONFIDENCE[self.remasking]]
        if self.near_tie is not None:
            measures.append("lead")
        noise = self._noise(prompts.index, len(starts) * steps, seed)

        for number, start in enumerate(starts):
            block = slice(start, min(start + self.block_size, self.gen_length))
            window = slice(width + block.start, width + block.stop)
            remaining = ~prompts.given[:, block] & ~done.unsqueeze(-1)
            counts = transfer_counts(remaining.sum(-1), steps)
            for step in counts.any(0).nonzero().flatten().tolist():
                at = number * steps + step
                rows = counts[:, step].nonzero().flatten()  # the others commit nothing in this step
                draw, order = (None if n is None else n[rows, at, : remaining.shape[1]] for n in noise)
                seen = None if mask is None else mask[rows]
                ids, *measured = policy.propose(tokens[rows], seen, window, self.temperature, draw, measures)
                key = (measured[0] if order is None else order).masked_fill(~remaining[rows], -torch.inf)
                rank = key.argsort(dim=-1, descending=True, stable=True).argsort(-1)
                picked = remaining[rows] & (rank < counts[rows, step, None])
                if self.near_tie is not None:
                    near_ties[rows] += ((measured[-1] <= self.near_tie) & picked).sum(-1)
                    if order is None:
                        near_ties[rows] += _lead(key, picked) <= self.near_tie
                commit = torch.zeros_like(remaining)
                commit[rows] = picked
                chosen = torch.zeros_like(remaining, dtype=tokens.dtype)
                chosen[rows] = ids
                tokens[:, window] = torch.where(commit, chosen, tokens[:, window])
                commit_step[:, block] = commit_step[:, block].masked_fill(commit, at)
                remaining = remaining & ~commit
            if self.stop_at_eos:
                done = done | (tokens[:, window] == policy.eos_id).any(-1)
                rest = done.unsqueeze(-1) & ~prompts.given[:, block.stop :]
                tokens[:, window.stop :] = tokens[:, window.stop :].masked_fill(rest, policy.eos_id)
                if bool(done.all()):
                    break

        completion = tokens[:, width:]
        return Rollout(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            completion_ids=completion,
            completion_mask=through_first(completion == policy.eos_id),
            given=prompts.given,
            group=prompts.group,
            index=prompts.index,
            commit_step=commit_step,
            near_ties=near_ties,
            texts=tuple(policy.text(row) for row in completion),
            examples=prompts.examples,
        )

    def _noise(self, index: Tensor, steps: int, seed: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Draw uniform numbers [B S W] for the tokens and for the order, where each is random."""
        wanted = (self.temperature > 0, self.remasking == "random")
        if not any(wanted):
            return None, None
        if seed is None:
            raise ValueError("decoding at temperature > 0 or with remasking=random needs a seed")
        streams = Streams(seed, index)
        tokens, order = (
            streams.uniform(steps, self.block_size, dtype=torch.double) if want else None for want in wanted
        )
        return tokens, order
