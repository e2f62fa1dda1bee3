"""Masking strategies: from a rollout to M masked copies of each sequence (paper, Section 3.3).

Every strategy masks holes only. Positions after the first EOS are masked in the input and, in the
region `to_eos`, never scored; template tokens are neither masked nor scored; padding is not touched.
The weight of a scored position is 1/t with t = (scored in this draw) / (positions in the region), the
realised ratio of the linear schedule, as the released code takes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from spg.limits import check_limits
from spg.seeding import Streams
from spg.types import MaskedSamples, Rollout


def choose_exactly(candidates: Tensor, counts: Tensor, streams: Streams) -> Tensor:
    """Pick `counts` [B ...] of the True positions of `candidates` [B ... T], uniformly; bool [B ... T]."""
    keys = streams.uniform(*candidates.shape[1:])
    order = keys.masked_fill(~candidates, 2.0).argsort(-1).argsort(-1)
    return candidates & (order < counts.unsqueeze(-1))


def uniform_count(totals: Tensor, streams: Streams) -> Tensor:
    """Draw a whole number uniform on {1, ..., total} for each of `totals` [B ...]; 0 where total is 0."""
    draw = streams.uniform(*totals.shape[1:])
    return ((draw * totals).long() + 1).minimum(totals)


class MaskingStrategy(ABC):
    """Draws `num_mc` masked copies of each sequence of a rollout.

    prompt_mask_prob: probability of masking each token of the prompt and of clean blocks.
    region: `to_eos` scores up to the first EOS, `all` also what follows it.
    """

    def __init__(self, num_mc: int = 2, prompt_mask_prob: float = 0.15, region: str = "to_eos") -> None:
        check_limits(num_mc=num_mc, prompt_mask_prob=prompt_mask_prob, region=region)
        self.num_mc = num_mc
        self.prompt_mask_prob = prompt_mask_prob
        self.region = region

    @abstractmethod
    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return (masked, scorable), each bool [B M T], for the region [B T].

        `masked` is decided for positions of the region only; `scorable` narrows down which of the
        masked ones are scored.
        """

    def __call__(self, rollout: Rollout, mask_id: int, seed: int) -> MaskedSamples:
        """Mask `rollout` (B sequences) M = num_mc times; draws derive from (seed, rollout.index)."""
        streams = Streams(seed, rollout.index)
        holes = ~rollout.given
        region = rollout.holes if self.region == "to_eos" else holes
        masked, scorable = self.draw(region, streams)
        beyond = (holes & ~region).unsqueeze(1)
        scored = masked & scorable
        prompt = self._mask_prompt(rollout.prompt_mask, streams)
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=-1)
        tokens = ids.unsqueeze(1).masked_fill(torch.cat([prompt, masked | beyond], dim=-1), mask_id)
        ratio = scored.sum(-1, keepdim=True).clamp_min(1) / region.sum(-1)[:, None, None].clamp_min(1)
        return MaskedSamples(tokens, scored, scored / ratio, region)

    def rounds(self, rollout: Rollout, mask_id: int, seeds: Sequence[int]) -> list[MaskedSamples]:
        """Return masked samples of `rollout` (B sequences) for each inner update on it, one a seed."""
        return [self(rollout, mask_id, seed) for seed in seeds]

    def _mask_prompt(self, prompt_mask: Tensor, streams: Streams) -> Tensor:
        # numbered from the prompt's end, so that padding on the left changes no draw
        draws = streams.uniform(self.num_mc, prompt_mask.shape[-1]).flip(-1)
        return (draws < self.prompt_mask_prob) & prompt_mask.unsqueeze(1)


class Full(MaskingStrategy):
    """Masks the whole completion: the one-step view of D1 (released name: `all`)."""

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        masked = region.unsqueeze(1).expand(-1, self.num_mc, -1)
        return masked, torch.ones_like(masked)


class Random(MaskingStrategy):
    """Masks a uniform number in {1, ..., n} of the region's n positions, anywhere in it."""

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        candidates = region.unsqueeze(1).expand(-1, self.num_mc, -1)
        masked = choose_exactly(candidates, uniform_count(candidates.sum(-1), streams), streams)
        return masked, torch.ones_like(masked)


class _BlockWise(MaskingStrategy):
    """Picks a block, keeps earlier blocks (almost) clean and masks all later ones.

    block_choice: `released` takes randperm(all blocks) modulo the eligible ones, which is not uniform
    when the completion ends early; `uniform` permutes the eligible blocks themselves. The M draws of
    a sequence take the first M entries of its permutation; a fresh one follows when it is used up.
    A block is eligible if it holds a position of the region.
    scored_positions: `masked` scores every masked position of the region (as released), `block` only
    those of the picked block.
    """

    def __init__(
        self,
        block_size: int,
        num_mc: int = 2,
        prompt_mask_prob: float = 0.15,
        region: str = "to_eos",
        block_choice: str = "released",
        scored_positions: str = "masked",
    ) -> None:
        super().__init__(num_mc, prompt_mask_prob, region)
        check_limits(block_size=block_size, block_choice=block_choice, scored_positions=scored_positions)
        self.block_size = block_size
        self.block_choice = block_choice
        self.scored_positions = scored_positions

    @abstractmethod
    def count(self, totals: Tensor, streams: Streams) -> Tensor:
        """Return how many of the picked block's `totals` [B M] positions to mask, [B M]."""

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        block = torch.arange(region.shape[-1], device=region.device) // self.block_size
        picked = self._pick(region, block, streams).unsqueeze(-1)
        inside = region.unsqueeze(1) & (block == picked)
        masked = choose_exactly(inside, self.count(inside.sum(-1), streams), streams)
        noise = streams.uniform(*masked.shape[1:]) < self.prompt_mask_prob
        masked = masked | (region.unsqueeze(1) & ((block > picked) | ((block < picked) & noise)))
        return masked, torch.ones_like(masked) if self.scored_positions == "masked" else inside

    def _pick(self, region: Tensor, block: Tensor, streams: Streams) -> Tensor:
        """Draw the number of the picked block for each sequence and draw, [B M]."""
        batch, num_blocks = region.shape[0], int(block[-1]) + 1
        occupied = torch.zeros(batch, num_blocks, dtype=torch.long, device=region.device)
        occupied = occupied.index_add(1, block, region.long()) > 0
        eligible = occupied.sum(-1).clamp_min(1)
        # eligible blocks first, in order, so that an index below `eligible` names one of them
        listed = (~occupied).long().argsort(dim=-1, stable=True)
        released = self.block_choice == "released"
        rounds = -(-self.num_mc // num_blocks) if released else self.num_mc
        keys = streams.uniform(rounds, num_blocks)
        if released:
            entries = (keys.argsort(-1) % eligible[:, None, None]).flatten(1)[:, : self.num_mc]
            return listed.gather(1, entries)
        unusable = torch.arange(num_blocks, device=region.device) >= eligible[:, None, None]
        entries = keys.masked_fill(unusable, 2.0).argsort(-1).flatten(1)
        draw = torch.arange(self.num_mc, device=region.device)
        # a round of a sequence with E eligible blocks holds E usable entries, at its front
        column = (draw // eligible.unsqueeze(-1)) * num_blocks + draw % eligible.unsqueeze(-1)
        return listed.gather(1, entries.gather(1, column))


class BlockRandom(_BlockWise):
    """Masks a uniform number in {1, ..., k} of the picked block's k positions (paper's default)."""

    def count(self, totals: Tensor, streams: Streams) -> Tensor:
        return uniform_count(totals, streams)


class BlockAll(_BlockWise):
    """Masks the whole picked block."""

    def count(self, totals: Tensor, streams: Streams) -> Tensor:
        return totals
