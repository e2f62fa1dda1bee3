"""Completions that a policy decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spg.evaluation.evaluator import Completion, Item
from spg.models.policy import Policy
from spg.rollout import collect
from spg.rollout.decoder import Decoder
from spg.tasks.base import Task

# The random streams of an example's samples lie this far apart: further than there are examples.
SAMPLES_APART = 2**32


@dataclass(frozen=True)
class Completer:
    """Decodes items in evaluation mode; the policy's mode is the same afterwards.

    Attributes:
        policy: The policy.
        decoder: The decoder.
        task: Gives prompts and templates.
        seed: With the numbers of example and sample it decides a completion's random draws.
    """

    policy: Policy
    decoder: Decoder
    task: Task
    seed: int = 0

    def __call__(self, items: Sequence[Item]) -> list[Completion]:
        """Complete a batch of items."""
        examples = [item.example for item in items]
        group = torch.tensor([item.index for item in items])
        index = torch.tensor([item.index + SAMPLES_APART * item.sample for item in items])
        with self.policy.decoding():
            rollout = collect.complete(
                self.policy, self.decoder, self.task, examples, group, index, self.seed
            )
        tokens, decoded = rollout.completion_mask.sum(-1), (rollout.commit_step >= 0).sum(-1)
        numbers = torch.stack([tokens, decoded, rollout.steps_taken, rollout.near_ties], 1).tolist()
        counted = self.decoder.near_tie is not None
        return [
            Completion(self.task.prompt(item.example), text, length, chosen, steps, ties if counted else None)
            for item, text, (length, chosen, steps, ties) in zip(items, rollout.texts, numbers, strict=True)
        ]
