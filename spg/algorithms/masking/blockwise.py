"""Block-wise masks: earlier blocks (almost) clean, one block masked in part or whole, later ones masked."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from spg.algorithms.masking.base import (
    MonteCarloMasking,
    Region,
    choose_exactly,
    count_of_share,
    uniform_count,
)
from spg.core.combinations import check_pairs
from spg.core.rules import Count, Probability, checked
from spg.core.seeding import Streams

BlockChoice = Literal["released", "uniform"]
ScoredPositions = Literal["masked", "block"]
Draws = Literal["independent", "antithetic", "stratified", "complementary"]


class BlockWise(MonteCarloMasking):
    """Picks a block, keeps earlier blocks (almost) clean and masks all later ones.

    A block is eligible if it holds a position of the region. The M draws of a sequence take the first M
    entries of a permutation of blocks; a fresh one follows when it is used up.

    Args:
        block_size: Tokens per block.
        num_mc: Number of masked copies of each sequence.
        prompt_mask_prob: Probability of masking each token of the prompt and of clean blocks.
        region: `to_eos` scores positions up to the first EOS, `all` also those after it.
        block_choice: `released` takes randperm(all blocks) modulo the eligible ones, which is not uniform
            when the completion ends early; `uniform` permutes the eligible blocks themselves.
        scored_positions: `masked` scores every masked position of the region, as the released code does,
            `block` only those of the picked block.
    """

    @checked
    def __init__(
        self,
        block_size: Count,
        num_mc: Count = 2,
        prompt_mask_prob: Probability = 0.15,
        region: Region = "to_eos",
        block_choice: BlockChoice = "released",
        scored_positions: ScoredPositions = "masked",
    ) -> None:
        super().__init__(num_mc, prompt_mask_prob, region)
        self.block_size = block_size
        self.block_choice = block_choice
        self.scored_positions = scored_positions

    @property
    def draws_per_block(self) -> int:
        """How many neighbouring draws take the same block."""
        return 1

    @abstractmethod
    def choose(self, inside: Tensor, picked: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Choose what to mask in the picked blocks.

        Args:
            inside: Positions of the picked blocks [B M T].
            picked: Numbers of the picked blocks [B M].
            streams: One stream of random numbers per sequence.

        Returns:
            `masked` [B M T], bool, and `factor` [B M 1], by which the weights of the draw are multiplied;
            it is 0 for a draw that scores nothing.
        """

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return what to mask and what to score, each [B M T], of the region [B T]."""
        block = torch.arange(region.shape[-1], device=region.device) // self.block_size
        picks = -(-self.num_mc // self.draws_per_block)
        picked = self._pick(region, block, picks, streams).repeat_interleave(self.draws_per_block, dim=1)
        picked = picked[:, : self.num_mc].unsqueeze(-1)
        inside = region.unsqueeze(1) & (block == picked)
        masked, factor = self.choose(inside, picked.squeeze(-1), streams)
        noise = streams.uniform(*masked.shape[1:]) < self.prompt_mask_prob
        masked = masked | (region.unsqueeze(1) & ((block > picked) | ((block < picked) & noise)))
        return masked, factor * (torch.ones_like(masked) if self.scored_positions == "masked" else inside)

    def _pick(self, region: Tensor, block: Tensor, picks: int, streams: Streams) -> Tensor:
        """Draw the numbers of `picks` blocks for each sequence, [B picks]."""
        batch, num_blocks = region.shape[0], -(-region.shape[1] // self.block_size)
        occupied = torch.zeros(batch, num_blocks, dtype=torch.long, device=region.device)
        occupied = occupied.index_add(1, block, region.long()) > 0
        eligible = occupied.sum(-1).clamp_min(1)
        # eligible blocks first, in order, so that an index below `eligible` names one of them
        listed = (~occupied).long().argsort(dim=-1, stable=True)
        released = self.block_choice == "released"
        rounds = -(-picks // num_blocks) if released else picks
        keys = streams.uniform(rounds, num_blocks)
        if released:
            entries = (keys.argsort(-1) % eligible[:, None, None]).flatten(1)[:, :picks]
            return listed.gather(1, entries)
        unusable = torch.arange(num_blocks, device=region.device) >= eligible[:, None, None]
        entries = keys.masked_fill(unusable, 2.0).argsort(-1).flatten(1)
        draw = torch.arange(picks, device=region.device)
        # a round of a sequence with E eligible blocks holds E usable entries, at its front
        column = (draw // eligible.unsqueeze(-1)) * num_blocks + draw % eligible.unsqueeze(-1)
        return listed.gather(1, entries.gather(1, column))


class BlockRandom(BlockWise):
    """Masks a uniform number in {1, ..., k} of the picked block's k positions (paper's default).

    `draws` says how the M draws of a sequence depend on each other. They are `independent` in the released
    code, except for their blocks. With the other options each draw alone keeps its distribution, or nearly:

    - `antithetic`: draws 2k and 2k + 1 mask shares that come from u and 1 - u.
    - `stratified`: the shares of the R draws that take the same block fall one into each of R equal strata;
      of the draws in the same stratum of their blocks, one falls into each of as many equal parts of it.
      If every block is taken R times, one of the M shares thus falls into each of M equal strata too.
    - `complementary`: draws 2k and 2k + 1 take the same block; the first masks a number uniform on
      {1, ..., k}, the second what the first leaves. If that is nothing, the second scores nothing, and
      needs no forward pass, and the first counts twice: every number in {1, ..., k} keeps its share of the
      pair, so that the mean over draws stays unbiased.

    Args:
        block_size: Tokens per block.
        num_mc: Number of masked copies of each sequence.
        prompt_mask_prob: Probability of masking each token of the prompt and of clean blocks.
        region: `to_eos` scores positions up to the first EOS, `all` also those after it.
        block_choice: How a block is picked, see `BlockWise`.
        scored_positions: Which masked positions are scored, see `BlockWise`.
        draws: How the draws depend on each other.

    Raises:
        ValueError: if draws=complementary and num_mc is odd.
    """

    # facts for the configuration check, see spg.config.parts
    draws_in_pairs = {"draws": ("antithetic", "complementary")}  # noqa: RUF012

    @checked
    def __init__(
        self,
        block_size: Count,
        num_mc: Count = 2,
        prompt_mask_prob: Probability = 0.15,
        region: Region = "to_eos",
        block_choice: BlockChoice = "released",
        scored_positions: ScoredPositions = "masked",
        draws: Draws = "independent",
    ) -> None:
        super().__init__(block_size, num_mc, prompt_mask_prob, region, block_choice, scored_positions)
        if draws == "complementary":
            check_pairs(num_mc, draws)
        self.draws = draws

    @property
    def draws_per_block(self) -> int:
        """How many neighbouring draws take the same block."""
        return 2 if self.draws == "complementary" else 1

    def choose(self, inside: Tensor, picked: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return what to mask [B M T] and the factor of the weights [B M 1]."""
        if self.draws == "complementary":
            inside = inside[:, ::2]
            first = choose_exactly(inside, uniform_count(inside.sum(-1), streams), streams)
            rest = inside & ~first
            paired = rest.any(-1, keepdim=True).long()
            factors = torch.stack([2 - paired, paired], dim=2)
            return torch.stack([first, rest], dim=2).flatten(1, 2), factors.flatten(1, 2)
        totals = inside.sum(-1)
        counts = count_of_share(totals, self._shares(picked, streams))
        return choose_exactly(inside, counts, streams), _factor_one(inside)

    def _shares(self, picked: Tensor, streams: Streams) -> Tensor:
        """Draw the share of each block of `picked` [B M] to mask, uniform from 0 to below 1, [B M]."""
        draws = picked.shape[1]
        if self.draws == "antithetic":
            half = streams.uniform(-(-draws // 2))
            # the same 2**24 numbers as those of the stream
            return torch.stack([half, (1 - 2**-24) - half], dim=-1).flatten(1)[:, :draws]
        shares = streams.uniform(draws)
        if self.draws == "stratified":
            stratum, strata = _numbers_within(picked, streams)
            part, parts = _numbers_within(stratum, streams)
            return (stratum + (part + shares) / parts) / strata
        return shares


def _numbers_within(label: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
    """Number draws with the same `label` [B M] from 0 on, at random; return number and count, each [B M]."""
    keys = streams.uniform(label.shape[1])
    same = label.unsqueeze(-1) == label.unsqueeze(1)
    return (same & (keys.unsqueeze(1) < keys.unsqueeze(-1))).sum(-1), same.sum(-1)


class BlockAll(BlockWise):
    """Masks the whole picked block."""

    def choose(self, inside: Tensor, picked: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return what to mask [B M T] and the factor of the weights [B M 1]."""
        # all positions are chosen, but the draws keep later numbers of the stream what they were
        return choose_exactly(inside, inside.sum(-1), streams), _factor_one(inside)


def _factor_one(inside: Tensor) -> Tensor:
    """Return the factor 1 of each draw, [B M 1]."""
    return torch.ones_like(inside[..., :1])
