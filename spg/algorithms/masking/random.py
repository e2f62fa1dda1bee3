"""Masks of positions anywhere in the region: all, a random number, a spread share, complementary pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spg.algorithms.masking.base import MonteCarloMasking, Region, choose_exactly, uniform_count
from spg.core.combinations import check_pairs
from spg.core.rules import Count, Probability, checked
from spg.core.seeding import Streams
from spg.core.types import MaskedSamples, Rollout


class Full(MonteCarloMasking):
    """Masks the whole completion: the one-step view of D1 (released name: `all`)."""

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return what to mask and what to score, each [B M T], of the region [B T]."""
        masked = region.unsqueeze(1).expand(-1, self.num_mc, -1)
        return masked, torch.ones_like(masked)


class Random(MonteCarloMasking):
    """Masks a uniform number in {1, ..., n} of the region's n positions, anywhere in it."""

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return what to mask and what to score, each [B M T], of the region [B T]."""
        candidates = region.unsqueeze(1).expand(-1, self.num_mc, -1)
        masked = choose_exactly(candidates, uniform_count(candidates.sum(-1), streams), streams)
        return masked, torch.ones_like(masked)


class Spread(MonteCarloMasking):
    """Masks positions anywhere in the region, a share spread evenly over the K updates on a rollout.

    Inner update k = 0, ..., K - 1 masks ceil(r n) of n positions, at least 1, with r = (u + k / K) mod 1.
    The number u is uniform; each rollout has one for each sequence and draw (UniGRPO: MMaDA, arXiv
    2505.15809). A direct call is that of the only inner update.
    """

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return what to mask and what to score, each [B M T], of the region [B T]."""
        return self._at(streams.uniform(self.num_mc), region, streams)

    def rounds(self, rollout: Rollout, mask_id: int, seeds: Sequence[int]) -> list[MaskedSamples]:
        """Return masked samples of `rollout` (B sequences) for each inner update; u is the first seed's."""
        region = self._region(rollout)
        streams = [Streams(seed, rollout.index) for seed in seeds]
        starts = [stream.uniform(self.num_mc) for stream in streams]  # each one's positions come after it
        rounds = []
        for inner, stream in enumerate(streams):
            masked, scorable = self._at((starts[0] + inner / len(seeds)) % 1, region, stream)
            rounds.append(self._samples(rollout, mask_id, stream, masked, scorable))
        return rounds

    def _at(self, ratio: Tensor, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return (masked, scorable) [B M T] with shares `ratio` [B M] of the region [B T] masked."""
        candidates = region.unsqueeze(1).expand(-1, self.num_mc, -1)
        counts = (ratio * candidates.sum(-1)).ceil().long().clamp_min(1)
        masked = choose_exactly(candidates, counts, streams)
        return masked, torch.ones_like(masked)


class Complementary(MonteCarloMasking):
    """Draws pairs of a random mask of the region and its complement (coupled-GRPO, ESPO: arXiv 2512.03759).

    Draw 2k masks a number uniform on {0, ..., n} of the region's n positions, draw 2k + 1 the others, so that
    each pair scores every position once. A draw that masks j of them weights each by (n + 1) / j, which makes
    the mean over draws an unbiased ELBO, as ESPO takes it. A draw that masks no position scores nothing.

    Raises:
        ValueError: if num_mc is odd.
    """

    # facts for the configuration check, see spg.config.parts
    draws_in_pairs = "complementary"

    @checked
    def __init__(
        self, num_mc: Count = 2, prompt_mask_prob: Probability = 0.0, region: Region = "to_eos"
    ) -> None:
        super().__init__(num_mc, prompt_mask_prob, region)
        check_pairs(num_mc, "complementary")

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return what to mask and what to score, each [B M T], of the region [B T]."""
        candidates = region.unsqueeze(1).expand(-1, self.num_mc // 2, -1)
        totals = candidates.sum(-1)
        first = choose_exactly(candidates, uniform_count(totals + 1, streams) - 1, streams)
        masked = torch.stack([first, candidates & ~first], dim=2).flatten(1, 2)
        factor = ((totals + 1) / totals.clamp_min(1)).repeat_interleave(2, dim=1)
        return masked, factor.unsqueeze(-1).expand_as(masked)
