"""What every masking strategy has, and how positions are drawn.

Every strategy masks holes only. Positions after the first EOS are masked in the input (a `Trajectory` shows
them as the policy saw them) and, in the region `to_eos`, never scored. Template tokens are neither masked nor
scored; padding is not touched. The weight of a scored position is 1/t with t = (scored in this draw) /
(positions in the region), the realised ratio of the linear schedule, as the released code takes it, unless
the strategy's docstring says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from spg.core.rules import Count, Probability, checked
from spg.core.seeding import Streams
from spg.core.types import MaskedSamples, Rollout

Region = Literal["to_eos", "all"]


def choose_exactly(candidates: Tensor, counts: Tensor, streams: Streams) -> Tensor:
    """Pick `counts` [B ...] of the True positions of `candidates` [B ... T], uniformly; bool [B ... T]."""
    keys = streams.uniform(*candidates.shape[1:])
    order = keys.masked_fill(~candidates, 2.0).argsort(-1).argsort(-1)
    return candidates & (order < counts.unsqueeze(-1))


def uniform_count(totals: Tensor, streams: Streams) -> Tensor:
    """Draw a whole number uniform on {1, ..., total} for each of `totals` [B ...]; 0 if the total is 0."""
    return count_of_share(totals, streams.uniform(*totals.shape[1:]))


def count_of_share(totals: Tensor, shares: Tensor) -> Tensor:
    """Return numbers in {1, ..., total} [B ...], 0 if the total is 0.

    Args:
        totals: Whole numbers [B ...].
        shares: Numbers from 0 to below 1 [B ...]; if they are uniform, so is the result.
    """
    return ((shares * totals).long() + 1).minimum(totals)


class MaskingStrategy(ABC):
    """Makes M masked copies of each sequence of a rollout.

    A class can declare facts for the configuration check (`spg.config.parts`): `fresh_each_update = False` if
    all inner updates get the same masks, `needs_commit_steps = True` if it follows the decoding steps, and
    `draws_in_pairs = "..."` with the kind of pairs if num_mc must be even.

    Args:
        prompt_mask_prob: Probability of masking each token of the prompt and of clean blocks.
        region: `to_eos` scores positions up to the first EOS, `all` also those after it.
    """

    @checked
    def __init__(self, prompt_mask_prob: Probability = 0.15, region: Region = "to_eos") -> None:
        self.prompt_mask_prob = prompt_mask_prob
        self.region = region

    @abstractmethod
    def __call__(self, rollout: Rollout, mask_id: int, seed: int) -> MaskedSamples:
        """Mask the B sequences of `rollout` M times; draws derive from (seed, rollout.index)."""

    def rounds(self, rollout: Rollout, mask_id: int, seeds: Sequence[int]) -> list[MaskedSamples]:
        """Return masked samples of the B sequences of `rollout` for each inner update on it, one per seed."""
        return [self(rollout, mask_id, seed) for seed in seeds]

    def _region(self, rollout: Rollout) -> Tensor:
        """Return the positions of `rollout` that may be scored, [B T]."""
        return rollout.holes if self.region == "to_eos" else ~rollout.given

    def _mask_prompt(self, prompt_mask: Tensor, draws: int, streams: Streams) -> Tensor:
        # numbered from the prompt's end, so that padding on the left changes no draw
        noise = streams.uniform(draws, prompt_mask.shape[-1]).flip(-1)
        return (noise < self.prompt_mask_prob) & prompt_mask.unsqueeze(1)


class MonteCarloMasking(MaskingStrategy):
    """Draws M = num_mc masked copies of each sequence at random.

    Args:
        num_mc: Number of masked copies of each sequence.
        prompt_mask_prob: Probability of masking each token of the prompt and of clean blocks.
        region: `to_eos` scores positions up to the first EOS, `all` also those after it.
    """

    @checked
    def __init__(
        self, num_mc: Count = 2, prompt_mask_prob: Probability = 0.15, region: Region = "to_eos"
    ) -> None:
        super().__init__(prompt_mask_prob, region)
        self.num_mc = num_mc

    @abstractmethod
    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Decide what to mask and what to score.

        Args:
            region: Positions that may be scored [B T].
            streams: One stream of random numbers per sequence.

        Returns:
            `masked` and `scorable`, each [B M T]. `masked`, bool, is decided for positions of the region
            only. `scorable` narrows down which of the masked positions are scored; if it is not bool, the
            weight 1/t is multiplied by it.
        """

    def __call__(self, rollout: Rollout, mask_id: int, seed: int) -> MaskedSamples:
        """Mask the B sequences of `rollout` num_mc times; draws derive from (seed, rollout.index)."""
        streams = Streams(seed, rollout.index)
        return self._samples(rollout, mask_id, streams, *self.draw(self._region(rollout), streams))

    def _samples(
        self, rollout: Rollout, mask_id: int, streams: Streams, masked: Tensor, scorable: Tensor
    ) -> MaskedSamples:
        """Return copies of `rollout` with `masked` [B M T] hidden, of which the `scorable` are scored."""
        region = self._region(rollout)
        beyond = (~rollout.given & ~region).unsqueeze(1)
        scored = masked & (scorable > 0)
        prompt = self._mask_prompt(rollout.prompt_mask, self.num_mc, streams)
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=-1)
        tokens = ids.unsqueeze(1).masked_fill(torch.cat([prompt, masked | beyond], dim=-1), mask_id)
        ratio = scored.sum(-1, keepdim=True).clamp_min(1) / region.sum(-1)[:, None, None].clamp_min(1)
        return MaskedSamples(tokens, scored, scored / ratio * scorable, region)
