"""The nouns that travel through one update: Rollout, Experience, MaskedSamples, UpdateBatch, Bounds.

Sizes: B sequences, M mask draws, P prompt length, T completion length, L = P + T.
Prompts are padded on the left, completions on the right, so that column P is the first
position of every completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from spg.core.world import World


def _rows(value: Any, index: Tensor | slice) -> Any:
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, Mapping):
        return {name: _rows(item, index) for name, item in value.items()}
    if isinstance(value, tuple):
        return value[index] if isinstance(index, slice) else tuple(value[i] for i in index.tolist())
    return value.select(index)


@dataclass(frozen=True)
class _Rows:
    """A record whose every field has one entry per sequence."""

    def select(self, index: Tensor | slice) -> Self:
        """Return the sequences at `index` [N], in that order; those of a slice are not copied."""
        return type(self)(**{f.name: _rows(getattr(self, f.name), index) for f in fields(self)})


@dataclass(frozen=True)
class Prompts(_Rows):
    """What the decoder starts from: tokenised prompts and, if the task has one, a template."""

    ids: Tensor  # [B P] left padded
    mask: Tensor  # [B P] True at real prompt tokens
    template: Tensor  # [B T] given tokens in place; tokens in holes are ignored
    given: Tensor  # [B T] True if the template gives the completion's token
    group: Tensor  # [B] number of the prompt that the sequence belongs to, over all processes
    index: Tensor  # [B] number of the sequence, over all processes; its random draws derive from it
    examples: tuple[Mapping[str, Any], ...]  # the task's examples, one per sequence


@dataclass(frozen=True)
class Rollout(_Rows):
    """Completions as the decoder left them, with all that later steps need to know about them."""

    prompt_ids: Tensor  # [B P] left padded
    prompt_mask: Tensor  # [B P] True at real prompt tokens
    completion_ids: Tensor  # [B T]
    completion_mask: Tensor  # [B T] True up to and including the first EOS
    given: Tensor  # [B T] template tokens: never masked, decoded or scored
    group: Tensor  # [B] number of the prompt that the sequence belongs to, over all processes
    index: Tensor  # [B] number of the sequence, over all processes; its random draws derive from it
    commit_step: Tensor  # [B T] decoding step that fixed the token, -1 if none did
    commit_logps: Tensor  # [B T] log-probability in that step, in nats, at temperature 1; 0 if none
    near_ties: Tensor  # [B] greedy decisions that rounding could change; 0 if they were not counted
    texts: tuple[str, ...]  # the completions, up to their EOS
    examples: tuple[Mapping[str, Any], ...]  # the task's examples, one per sequence

    @classmethod
    def of_completions(
        cls,
        prompts: Prompts,
        completion_ids: Tensor,
        completion_mask: Tensor,
        texts: tuple[str, ...],
        examples: tuple[Mapping[str, Any], ...],
    ) -> Self:
        """Return completions [B T] that no decoder made: no step committed any of their tokens."""
        return cls(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            given=prompts.given,
            group=prompts.group,
            index=prompts.index,
            commit_step=torch.full_like(completion_ids, -1),
            commit_logps=torch.zeros(completion_ids.shape, device=completion_ids.device),
            near_ties=torch.zeros_like(prompts.index),
            texts=texts,
            examples=examples,
        )

    @property
    def holes(self) -> Tensor:
        """Positions that the policy decided itself, up to and including the first EOS [B T]."""
        return self.completion_mask & ~self.given

    @property
    def attention_mask(self) -> Tensor:
        """True at the positions that the policy sees, all but the prompt's padding [B L]."""
        return torch.cat([self.prompt_mask, torch.ones_like(self.given)], dim=-1)

    @property
    def lengths(self) -> Tensor:
        """Number of holes up to and including the first EOS [B]."""
        return self.holes.sum(-1)

    @property
    def steps_taken(self) -> Tensor:
        """Number of decoding steps that committed a token [B]."""
        ordered = F.pad(self.commit_step, (1, 0), value=-1).sort(-1).values
        return (ordered[:, 1:] != ordered[:, :-1]).sum(-1)

    def inputs_at(self, step: Tensor, mask_id: int) -> Tensor:
        """Return the policy's inputs [B M L] in decoding steps `step` [B M] of the sequences."""
        commit = self.commit_step.unsqueeze(1)
        hidden = ~self.given.unsqueeze(1) & ((commit < 0) | (commit >= step.unsqueeze(-1)))
        completion = self.completion_ids.unsqueeze(1).masked_fill(hidden, mask_id)
        prompt = self.prompt_ids.unsqueeze(1).expand(-1, step.shape[1], -1)
        return torch.cat([prompt, completion], dim=-1)

    def truncate(self, length: int) -> Self:
        """Return the rollout with the first `length` positions of its completions."""
        names = ("completion_ids", "completion_mask", "given", "commit_step", "commit_logps")
        return replace(self, **{name: getattr(self, name)[:, :length] for name in names})


@dataclass(frozen=True)
class Experience(_Rows):
    """A rollout with its rewards and advantages."""

    rollout: Rollout
    rewards: Tensor  # [B]
    reward_parts: Mapping[str, Tensor]  # {name: [B]}
    advantages: Tensor  # [B]


@dataclass(frozen=True)
class MaskedSamples(_Rows):
    """M masked copies of each sequence, and which of their positions count for how much."""

    tokens: Tensor  # [B M L] with [MASK] in place
    scored: Tensor  # [B M T] positions whose log-probability is estimated; masked, in the region
    weight: Tensor  # [B M T] w(t) = 1/t at scored positions, 0 elsewhere
    region: Tensor  # [B T] positions that may be scored: holes, up to the first EOS or all

    @property
    def lengths(self) -> Tensor:
        """Number of positions in the region [B]."""
        return self.region.sum(-1)

    def truncate(self, length: int) -> Self:
        """Return the samples with the first `length` positions of their completions."""
        beyond = self.region.shape[-1] - length
        return replace(
            self,
            tokens=self.tokens[..., : self.tokens.shape[-1] - beyond],
            scored=self.scored[..., :length],
            weight=self.weight[..., :length],
            region=self.region[..., :length],
        )


@dataclass(frozen=True)
class Cohort:
    """All N sequences of an update, those of all processes: what normalisers count."""

    group: Tensor  # [N] number of the prompt that a sequence belongs to
    advantages: Tensor  # [N]
    lengths: Tensor  # [N] positions that may be scored
    scored: Tensor  # [N] positions that are scored, over all draws
    draws: Tensor  # [N] draws that score a position
    own: slice  # the B of them that this process computes

    @classmethod
    def of(cls, experience: Experience, samples: MaskedSamples, world: World | None = None) -> Cohort:
        """Return the cohort of this process's B sequences; every process of `world` has as many."""
        world = world or World()
        counts = [
            experience.rollout.group,
            samples.lengths,
            samples.scored.sum((1, 2)),
            samples.scored.any(-1).sum(-1),
        ]
        group, lengths, scored, draws = world.gather(torch.stack(counts, 1)).unbind(1)
        advantages = world.gather(experience.advantages)
        first = world.rank * len(experience.advantages)
        own = slice(first, first + len(experience.advantages))
        return cls(group, advantages, lengths, scored, draws, own)


@dataclass(frozen=True)
class UpdateBatch:
    """What an optimizer step learns from: B sequences of this process under M masks each.

    Objectives get it beside the policy's log-probabilities [B M T]. `old` and `reference` are
    log-probabilities of other policies under the same masks, present if the objective needs them.
    """

    experience: Experience
    samples: MaskedSamples
    cohort: Cohort
    old: Tensor | None = None  # [B M T] of the policy that made the rollout; None if it is still that policy
    reference: Tensor | None = None  # [B M T] of the model before training
    is_part: bool = False  # whether it is some sequences of a larger batch; see `part`

    @classmethod
    def of(
        cls,
        experience: Experience,
        samples: MaskedSamples,
        *,
        old: Tensor | None = None,
        reference: Tensor | None = None,
        world: World | None = None,
    ) -> UpdateBatch:
        """Return the batch of this process's sequences, with the cohort of all processes of `world`."""
        return cls(experience, samples, Cohort.of(experience, samples, world), old, reference)

    def select(self, index: Tensor) -> UpdateBatch:
        """Return the sequences at `index` [N], in that order, as a batch of one process by themselves."""
        old = None if self.old is None else self.old[index]
        reference = None if self.reference is None else self.reference[index]
        experience, samples = self.experience.select(index), self.samples.select(index)
        return UpdateBatch.of(experience, samples, old=old, reference=reference)

    def part(self, rows: slice) -> UpdateBatch:
        """Return the sequences `rows` of this process, which keep the cohort of all.

        If an objective does not compare sequences of different parts, the losses of the parts add up to the
        loss of the whole.
        """
        first = self.cohort.own.start
        return UpdateBatch(
            self.experience.select(rows),
            self.samples.select(rows),
            replace(self.cohort, own=slice(first + rows.start, first + rows.stop)),
            None if self.old is None else self.old[rows],
            None if self.reference is None else self.reference[rows],
            is_part=True,
        )


@dataclass(frozen=True)
class Bounds:
    """Per-token parts of a lower and an upper bound [B T]; their sum over T is the sequence's."""

    lower: Tensor
    upper: Tensor
