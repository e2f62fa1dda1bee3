"""Masking strategies: from a rollout to M masked copies of each sequence (paper, Section 3.3).

Every strategy masks holes only. Positions after the first EOS are masked in the input (a `Trajectory` shows
them as the policy saw them) and, in the region `to_eos`, never scored; template tokens are neither masked nor
scored; padding is not touched. The weight of a scored position is 1/t with t = (scored in this draw) /
(positions in the region), the realised ratio of the linear schedule, as the released code takes it, unless
the strategy says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from spg.core.combinations import check_pairs
from spg.core.limits import check_limits
from spg.core.seeding import Streams
from spg.core.types import MaskedSamples, Rollout


def choose_exactly(candidates: Tensor, counts: Tensor, streams: Streams) -> Tensor:
    """Pick `counts` [B ...] of the True positions of `candidates` [B ... T], uniformly; bool [B ... T]."""
    keys = streams.uniform(*candidates.shape[1:])
    order = keys.masked_fill(~candidates, 2.0).argsort(-1).argsort(-1)
    return candidates & (order < counts.unsqueeze(-1))


def uniform_count(totals: Tensor, streams: Streams) -> Tensor:
    """Draw a whole number uniform on {1, ..., total} for each of `totals` [B ...]; 0 where total is 0."""
    return share_of(totals, streams.uniform(*totals.shape[1:]))


def share_of(totals: Tensor, shares: Tensor) -> Tensor:
    """Return numbers in {1, ..., total} [B ...], uniform if `shares` are, from 0 to 1; 0 of a total of 0."""
    return ((shares * totals).long() + 1).minimum(totals)


class MaskingStrategy(ABC):
    """Makes M masked copies of each sequence of a rollout.

    prompt_mask_prob: probability of masking each token of the prompt and of clean blocks.
    region: `to_eos` scores up to the first EOS, `all` also what follows it.
    """

    def __init__(self, prompt_mask_prob: float = 0.15, region: str = "to_eos") -> None:
        check_limits(prompt_mask_prob=prompt_mask_prob, region=region)
        self.prompt_mask_prob = prompt_mask_prob
        self.region = region

    @abstractmethod
    def __call__(self, rollout: Rollout, mask_id: int, seed: int) -> MaskedSamples:
        """Mask `rollout` (B sequences) M times; draws derive from (seed, rollout.index)."""

    def rounds(self, rollout: Rollout, mask_id: int, seeds: Sequence[int]) -> list[MaskedSamples]:
        """Return masked samples of `rollout` (B sequences) for each inner update on it, one a seed."""
        return [self(rollout, mask_id, seed) for seed in seeds]

    def _region(self, rollout: Rollout) -> Tensor:
        """Return the positions of `rollout` that may be scored, [B T]."""
        return rollout.holes if self.region == "to_eos" else ~rollout.given

    def _mask_prompt(self, prompt_mask: Tensor, draws: int, streams: Streams) -> Tensor:
        # numbered from the prompt's end, so that padding on the left changes no draw
        noise = streams.uniform(draws, prompt_mask.shape[-1]).flip(-1)
        return (noise < self.prompt_mask_prob) & prompt_mask.unsqueeze(1)


class Drawn(MaskingStrategy):
    """Draws M = num_mc masked copies of each sequence at random."""

    def __init__(self, num_mc: int = 2, prompt_mask_prob: float = 0.15, region: str = "to_eos") -> None:
        super().__init__(prompt_mask_prob, region)
        check_limits(num_mc=num_mc)
        self.num_mc = num_mc

    @abstractmethod
    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return (masked, scorable), each [B M T], for the region [B T].

        `masked`, bool, is decided for positions of the region only; `scorable` narrows down which of the
        masked ones are scored. Where it is no bool, it is what the weight 1/t is multiplied by.
        """

    def __call__(self, rollout: Rollout, mask_id: int, seed: int) -> MaskedSamples:
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


class Full(Drawn):
    """Masks the whole completion: the one-step view of D1 (released name: `all`)."""

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        masked = region.unsqueeze(1).expand(-1, self.num_mc, -1)
        return masked, torch.ones_like(masked)


class Random(Drawn):
    """Masks a uniform number in {1, ..., n} of the region's n positions, anywhere in it."""

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        candidates = region.unsqueeze(1).expand(-1, self.num_mc, -1)
        masked = choose_exactly(candidates, uniform_count(candidates.sum(-1), streams), streams)
        return masked, torch.ones_like(masked)


class Spread(Drawn):
    """Masks positions anywhere in the region, a share spread evenly over the K updates on a rollout.

    Inner update k = 0, ..., K - 1 masks ceil(r n) of n positions, at least 1, with r = (u + k / K) mod 1;
    u is uniform, one a rollout for each sequence and draw (UniGRPO: MMaDA, arXiv 2505.15809). Called by
    itself it is the only inner update.
    """

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
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


class Complementary(Drawn):
    """Draws pairs of a random mask of the region and its complement (coupled-GRPO, ESPO: arXiv 2512.03759).

    Draw 2k masks a number uniform on {0, ..., n} of the region's n positions, draw 2k + 1 the others, so that
    each pair scores every position once. A draw that masks j of them weights each by (n + 1) / j, which makes
    the mean over draws an unbiased ELBO, as ESPO takes it. A draw that masks none scores nothing. Raises
    ValueError where num_mc is odd.
    """

    # for the configuration check: see spg.config.parts
    draws_in_pairs = "complementary"

    def __init__(self, num_mc: int = 2, prompt_mask_prob: float = 0.0, region: str = "to_eos") -> None:
        super().__init__(num_mc, prompt_mask_prob, region)
        check_pairs(num_mc, "complementary")

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        candidates = region.unsqueeze(1).expand(-1, self.num_mc // 2, -1)
        totals = candidates.sum(-1)
        first = choose_exactly(candidates, uniform_count(totals + 1, streams) - 1, streams)
        masked = torch.stack([first, candidates & ~first], dim=2).flatten(1, 2)
        factor = ((totals + 1) / totals.clamp_min(1)).repeat_interleave(2, dim=1)
        return masked, factor.unsqueeze(-1).expand_as(masked)


class Trajectory(MaskingStrategy):
    """Shows the sequence as the policy saw it in each of its decoding steps (StepWise, LLaDOU).

    Draw s is the s-th step, in order, that committed a token of the region: those tokens are scored, with
    weight M, so that the mean over draws is the sum over steps; its log-probabilities at temperature 1 are
    the rollout's commit_logps. M is the largest number of such steps of a sequence; the others score nothing
    in the draws that they lack, nor need a forward pass for them.
    """

    # for the configuration check: see spg.config.parts
    fresh_each_update = False
    needs_commit_steps = True

    def __init__(self, prompt_mask_prob: float = 0.0, region: str = "to_eos") -> None:
        super().__init__(prompt_mask_prob, region)

    def __call__(self, rollout: Rollout, mask_id: int, seed: int) -> MaskedSamples:
        region = self._region(rollout)
        committed = region & (rollout.commit_step >= 0)
        steps = max(1, int(rollout.commit_step.amax()) + 1)
        taken = torch.zeros(len(region), steps + 1, dtype=torch.long, device=region.device)
        taken = taken.scatter(1, rollout.commit_step.masked_fill(~committed, steps), 1)[:, :steps]
        draws = max(1, int(taken.sum(-1).amax()))
        # a row's own steps first, in order; in the others it has nothing to score
        step = taken.argsort(dim=-1, descending=True, stable=True)[:, :draws]
        scored = committed.unsqueeze(1) & (rollout.commit_step.unsqueeze(1) == step.unsqueeze(-1))
        prompt = self._mask_prompt(rollout.prompt_mask, draws, Streams(seed, rollout.index))
        hidden = torch.cat([prompt, torch.zeros_like(scored)], dim=-1)
        tokens = rollout.seen_at(step, mask_id).masked_fill(hidden, mask_id)
        return MaskedSamples(tokens, scored, scored * float(draws), region)


class _BlockWise(Drawn):
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

    @property
    def sharing(self) -> int:
        """How many neighbouring draws take the same block."""
        return 1

    @abstractmethod
    def choose(self, inside: Tensor, picked: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return (masked, factor) of the positions `inside` [B M T] of the blocks `picked` [B M].

        factor [B M 1]: what the draw's weights are multiplied by, 0 for a draw that scores nothing.
        """

    def draw(self, region: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        block = torch.arange(region.shape[-1], device=region.device) // self.block_size
        picks = -(-self.num_mc // self.sharing)
        picked = self._pick(region, block, picks, streams).repeat_interleave(self.sharing, dim=1)
        picked = picked[:, : self.num_mc].unsqueeze(-1)
        inside = region.unsqueeze(1) & (block == picked)
        masked, factor = self.choose(inside, picked.squeeze(-1), streams)
        noise = streams.uniform(*masked.shape[1:]) < self.prompt_mask_prob
        masked = masked | (region.unsqueeze(1) & ((block > picked) | ((block < picked) & noise)))
        return masked, factor * (torch.ones_like(masked) if self.scored_positions == "masked" else inside)

    def _pick(self, region: Tensor, block: Tensor, picks: int, streams: Streams) -> Tensor:
        """Draw the numbers of `picks` blocks for each sequence, [B picks]."""
        batch, num_blocks = region.shape[0], int(block[-1]) + 1
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


class BlockRandom(_BlockWise):
    """Masks a uniform number in {1, ..., k} of the picked block's k positions (paper's default).

    draws: how the M draws of a sequence hang together. `independent`, as released: but for their blocks not
    at all. Otherwise each draw by itself keeps its distribution, or nearly so:
    - `antithetic`: draws 2k and 2k + 1 mask shares that come from u and 1 - u.
    - `stratified`: the shares of the R draws that take the same block fall one into each of R equal strata;
      of the draws in the same stratum of their blocks, one falls into each of as many equal parts of it.
      Where every block is taken R times, one of the M shares thus falls into each of M equal strata too.
    - `complementary`: draws 2k and 2k + 1 take the same block; the first masks a number uniform on
      {1, ..., k}, the second what the first leaves. Where that is nothing, the second scores nothing, and
      needs no forward pass, and the first counts twice: every number in {1, ..., k} keeps its share of the
      pair, so that the mean over draws stays unbiased. num_mc is even, or ValueError is raised.
    """

    # for the configuration check: see spg.config.parts
    draws_in_pairs = {"draws": ("antithetic", "complementary")}  # noqa: RUF012

    def __init__(
        self,
        block_size: int,
        num_mc: int = 2,
        prompt_mask_prob: float = 0.15,
        region: str = "to_eos",
        block_choice: str = "released",
        scored_positions: str = "masked",
        draws: str = "independent",
    ) -> None:
        super().__init__(block_size, num_mc, prompt_mask_prob, region, block_choice, scored_positions)
        check_limits(draws=draws)
        if draws == "complementary":
            check_pairs(num_mc, draws)
        self.draws = draws

    @property
    def sharing(self) -> int:
        return 2 if self.draws == "complementary" else 1

    def choose(self, inside: Tensor, picked: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        if self.draws == "complementary":
            inside = inside[:, ::2]
            first = choose_exactly(inside, uniform_count(inside.sum(-1), streams), streams)
            rest = inside & ~first
            paired = rest.any(-1, keepdim=True).long()
            factors = torch.stack([2 - paired, paired], dim=2)
            return torch.stack([first, rest], dim=2).flatten(1, 2), factors.flatten(1, 2)
        totals = inside.sum(-1)
        counts = share_of(totals, self._shares(picked, streams))
        return choose_exactly(inside, counts, streams), _once(inside)

    def _shares(self, picked: Tensor, streams: Streams) -> Tensor:
        """Draw the shares of the blocks `picked` [B M] to mask, each uniform from 0 to below 1, [B M]."""
        draws = picked.shape[1]
        if self.draws == "antithetic":
            half = streams.uniform(-(-draws // 2))
            # of the same 2**24 numbers as the stream's
            return torch.stack([half, (1 - 2**-24) - half], dim=-1).flatten(1)[:, :draws]
        shares = streams.uniform(draws)
        if self.draws == "stratified":
            stratum, strata = _shuffled(picked, streams)
            part, parts = _shuffled(stratum, streams)
            return (stratum + (part + shares) / parts) / strata
        return shares


def _shuffled(label: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
    """Number draws with the same `label` [B M] from 0 on, at random; return number and count, each [B M]."""
    keys = streams.uniform(label.shape[1])
    same = label.unsqueeze(-1) == label.unsqueeze(1)
    return (same & (keys.unsqueeze(1) < keys.unsqueeze(-1))).sum(-1), same.sum(-1)


class BlockAll(_BlockWise):
    """Masks the whole picked block."""

    def choose(self, inside: Tensor, picked: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        # the numbers are drawn so that they stay what they were
        return choose_exactly(inside, inside.sum(-1), streams), _once(inside)


def _once(inside: Tensor) -> Tensor:
    """Return the factor 1 of each draw, [B M 1]."""
    return torch.ones_like(inside[..., :1])
