"""The gradient of an update, exact in pieces of any size and over any number of processes.

If the B x M masked copies do not fit at once, `ExactGradient` cuts them into pieces, in one of two ways.

One pass, if each piece can hold all copies of whatever the objective joins (`coupling`): the M draws of a
sequence, or those of a whole group. The cohort's numbers are known beforehand, so that the losses of the
pieces, each on its own sequences, add up to the loss.

Two passes otherwise: (1) all log-probabilities [B M T], without gradient, piece by piece; (2) the loss on
that small tensor and its gradient with respect to it; (3) each piece again, its backward pass starting from
that gradient. The loss may thus join draws and sequences in any way: the mean over draws is inside the log of
the EUBO. One extra forward pass is the price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from spg.algorithms.objectives import Objective, ObjectiveResult, coupling
from spg.core.types import Experience, MaskedSamples, UpdateBatch
from spg.core.world import World
from spg.models.policy import Policy
from spg.training.fsdp import sharding_of
from spg.training.pieces import Copies, Piece


@dataclass(frozen=True)
class BackwardPasses:
    """How the processes of a run add their gradients up.

    Attributes:
        world: The processes; the default is one.
        backward: Runs one backward pass.
        without_exchange: A context in which backward passes leave gradients in their process.
        all_exchange: Whether each backward pass exchanges gradients, as with sliced weights, so that every
            process must make as many as the others; otherwise the last one alone does.
    """

    world: World = field(default_factory=World)
    backward: Callable[[Tensor], None] = Tensor.backward
    without_exchange: Callable[[], AbstractContextManager[Any]] = nullcontext
    all_exchange: bool = False

    @classmethod
    def of(cls, module: pl.LightningModule, world: World) -> BackwardPasses:
        """Return the backward passes of a module that Lightning trains in the processes of `world`."""
        strategy = module.trainer.strategy
        without = strategy.block_backward_sync if isinstance(strategy, ParallelStrategy) else nullcontext
        sliced = sharding_of(module) is not None
        return cls(world, module.manual_backward, without, all_exchange=sliced)

    def run(
        self, losses: Iterator[Tensor], count: int, idle: Callable[[], Tensor], device: torch.device
    ) -> None:
        """Run this process's backward passes, and idle ones while other processes still work.

        Args:
            losses: The `count` losses; each is computed only when its turn comes.
            count: Their number, which may differ between processes and be 0.
            idle: Returns a loss of 0 that depends on all weights.
            device: Of the weights.
        """
        if self.world.size > 1:
            most = int(self.world.gather(torch.tensor([count], device=device)).max())
            if not self.all_exchange:
                most = min(most, 1)  # the others wait for this process's gradients, once
            missing = max(0, most - count)
            losses = chain(losses, (idle() for _ in range(missing)))
            count += missing
        for number, loss in enumerate(losses, start=1):
            with nullcontext() if number == count else self.without_exchange():
                self.backward(loss * self.world.size)  # processes average gradients


@dataclass(frozen=True)
class ExactGradient:
    """Adds the gradient of an objective to the weights of a policy.

    Attributes:
        policy: Whose weights are trained.
        objective: The loss.
        micro_batch_size: Masked sequences (completions x draws) in one forward pass; None for all of them.
            It changes no gradient.
    """

    policy: Policy
    objective: Objective
    micro_batch_size: int | None = None

    def add(self, batch: UpdateBatch, passes: BackwardPasses | None = None) -> ObjectiveResult:
        """Add the gradient of the loss on `batch` to the weights' gradients.

        Sequences that the objective does not learn from are not computed.

        Args:
            batch: This process's sequences and masks; see `freeze`.
            passes: How gradients are summed over processes; by default there is one process.

        Returns:
            This process's share of the loss, without gradient, and the objective's figures.
        """
        passes = passes or BackwardPasses()
        copies = self._copies(batch)
        pieces = copies.cut(self.micro_batch_size)
        if len(pieces) <= 1:
            token_logps = _zeros(batch)
            for piece in pieces:
                token_logps = token_logps.index_put(piece.at, self.token_logps(batch, piece))
            result = self.objective(token_logps, batch)
            losses = iter([result.loss] if pieces else [])
            passes.run(losses, len(pieces), lambda: self._zero(batch), self.policy.device)
        else:
            assert self.micro_batch_size is not None
            parts = copies.cut_whole(self.micro_batch_size, coupling(self.objective))
            if parts is None:
                result = self._add_in_two_passes(batch, pieces, passes)
            else:
                result = self._add_in_parts(batch, parts, passes)
        return replace(result, loss=result.loss.detach())

    def _add_in_parts(
        self, batch: UpdateBatch, parts: Sequence[tuple[slice, Piece]], passes: BackwardPasses
    ) -> ObjectiveResult:
        found = _zeros(batch)

        def losses() -> Iterator[Tensor]:
            for rows, piece in parts:
                part = batch.part(rows)
                logps = self.token_logps(batch, piece)
                found[piece.at] = logps.detach()
                own = _zeros(part).index_put((piece.rows - rows.start, piece.draws), logps)
                yield self.objective(own, part).loss

        passes.run(losses(), len(parts), lambda: self._zero(batch), self.policy.device)
        with torch.no_grad():  # the figures, and what the objective learns from whole updates
            return self.objective(found, batch)

    def _add_in_two_passes(
        self, batch: UpdateBatch, pieces: Sequence[Piece], passes: BackwardPasses
    ) -> ObjectiveResult:
        states: list[Tensor] = []
        frozen = self.all_logps(batch, pieces, states)
        frozen.requires_grad_()
        result = self.objective(frozen, batch)
        (gradient,) = torch.autograd.grad(result.loss, frozen)
        after = _random_state(frozen.device)

        def losses() -> Iterator[Tensor]:
            for piece, state in zip(pieces, states, strict=True):
                _set_random_state(state, frozen.device)  # the same dropout as in the first pass
                yield (self.token_logps(batch, piece) * gradient[piece.at]).sum()

        passes.run(losses(), len(pieces), lambda: self._zero(batch), self.policy.device)
        _set_random_state(after, frozen.device)
        return result

    def freeze(self, batch: UpdateBatch, *, policy_changes: bool) -> UpdateBatch:
        """Return the batch with the log-probabilities of other policies that the objective needs.

        They are computed without dropout.

        Args:
            batch: The sequences and masks.
            policy_changes: Whether the policy will have changed before it learns from the batch. If not, it
                is still the policy that made the rollout, and `old` is left out.
        """
        old, reference = None, None
        pieces = self.split(batch) if self.objective.needs else []
        if "old" in self.objective.needs and policy_changes:
            was_training = self.policy.training
            self.policy.eval()
            old = self.all_logps(batch, pieces)
            self.policy.train(was_training)
        if "reference" in self.objective.needs:
            with self.policy.as_reference():
                reference = self.all_logps(batch, pieces)
        return replace(batch, old=old, reference=reference)

    def all_logps(
        self,
        batch: UpdateBatch,
        pieces: Sequence[Piece] | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Return log-probabilities [B M T] without gradient, 0 for what the objective does not learn from.

        Args:
            batch: The sequences and masks.
            pieces: What is computed at once; by default what `split` returns.
            states: Takes the state of the random generator before each piece.
        """
        logps = _zeros(batch)
        with torch.no_grad():
            for piece in self.split(batch) if pieces is None else pieces:
                if states is not None:
                    states.append(_random_state(logps.device))
                logps[piece.at] = self.token_logps(batch, piece)
        return logps

    def split(self, batch: UpdateBatch) -> list[Piece]:
        """Cut the masked copies to compute into pieces of at most micro_batch_size, anywhere."""
        return self._copies(batch).cut(self.micro_batch_size)

    def _copies(self, batch: UpdateBatch) -> Copies:
        return Copies.of(batch, self.objective.learns_from(batch.experience))

    def token_logps(self, batch: UpdateBatch, piece: Piece) -> Tensor:
        """Return the policy's log-probabilities [K T] of a piece of K masked copies."""
        rollout = batch.experience.rollout
        tokens = batch.samples.tokens[piece.at][:, piece.padding :]
        mask = rollout.attention_mask[piece.rows][:, piece.padding :] if piece.padded else None
        targets, scored = rollout.completion_ids[piece.rows], batch.samples.scored[piece.at]
        return self.policy.token_logps(tokens, mask, targets, scored, piece.scored)

    def _zero(self, batch: UpdateBatch) -> Tensor:
        """Return a zero that depends on all weights: log-probabilities at one position, times 0."""
        rollout, samples = batch.experience.rollout, batch.samples
        scored = torch.zeros_like(samples.scored[:1, 0])
        scored[:, 0] = True
        mask = rollout.attention_mask[:1]
        tokens, targets = samples.tokens[:1, 0], rollout.completion_ids[:1]
        return self.policy.token_logps(tokens, mask, targets, scored, [1]).sum() * 0.0


def truncate_to_learned(
    experience: Experience, samples: MaskedSamples, objective: Objective, world: World
) -> tuple[Experience, MaskedSamples]:
    """Return both without the positions after the longest completion that any process learns from."""
    length = longest_learned(experience, samples, objective, world)
    return replace(experience, rollout=experience.rollout.truncate(length)), samples.truncate(length)


def longest_learned(
    experience: Experience, samples: MaskedSamples, objective: Objective, world: World
) -> int:
    """Return how far the longest completion reaches that any process learns from, 1 or more."""
    region = samples.region & objective.learns_from(experience).unsqueeze(-1)
    reach = (torch.arange(1, region.shape[-1] + 1, device=region.device) * region).amax()
    return max(1, int(world.gather(reach.view(1)).max()))


def _zeros(batch: UpdateBatch) -> Tensor:
    """Return zeros [B M T], one for each log-probability of a batch."""
    return torch.zeros(batch.samples.scored.shape, device=batch.samples.scored.device)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
