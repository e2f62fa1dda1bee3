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
        steps = rollout.steps_taken.tolist()
        tokens = rollout.completion_mask.sum(-1).tolist()
        decoded = (rollout.commit_step >= 0).sum(-1).tolist()
        known = self.decoder.near_tie is not None
        ties = rollout.near_ties.tolist() if known else [None] * len(items)
        return [
            Completion(self.task.prompt(item.example), *rest)
            for item, *rest in zip(items, rollout.texts, tokens, decoded, steps, ties, strict=True)
        ]
