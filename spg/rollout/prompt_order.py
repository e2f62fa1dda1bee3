"""The order of prompts: which examples a rollout starts from follows from (seed, rollout) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import IterableDataset

from spg.core.examples import Example
from spg.core.seeding import generator


class PromptStream(IterableDataset[list[Example]]):
    """Gives `count` examples for each rollout; every example comes once before any comes again.

    Pass number k over the examples is a permutation that derives from (seed, k).

    Args:
        examples: The training examples.
        count: Number of examples for each rollout.
        rollouts: Number of rollouts, the length of the stream.
        seed: Seed of the permutations.

    Raises:
        ValueError: if there are no examples.
    """

    def __init__(self, examples: Sequence[Example], count: int, rollouts: int, seed: int) -> None:
        super().__init__()
        if not examples:
            raise ValueError("the training split has no examples")
        self.items = examples
        self.count = count
        self.rollouts = rollouts
        self.seed = seed
        self._passes: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.rollouts

    def __iter__(self) -> Iterator[list[Example]]:
        return (self.examples(number) for number in range(self.rollouts))

    def examples(self, rollout: int) -> list[Example]:
        """Return the `count` examples of a rollout, which are numbered from 0."""
        first = rollout * self.count
        return [self._at(first + i) for i in range(self.count)]

    def _at(self, position: int) -> Example:
        number, index = divmod(position, len(self.items))
        if number not in self._passes:
            order = torch.randperm(len(self.items), generator=generator(self.seed, "prompts", number))
            self._passes = {number: order.tolist(), **dict(list(self._passes.items())[:1])}
        return self.items[self._passes[number][index]]
