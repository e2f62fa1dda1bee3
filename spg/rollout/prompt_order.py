"""Which examples a rollout starts from: a function of (seed, rollout), not of a position in a loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import IterableDataset

from spg.core.examples import Example
from spg.core.seeding import generator


class PromptStream(IterableDataset[list[Example]]):
    """Yields `count` prompts for each rollout, every example once before any comes again.

    Pass number k over the n examples is a permutation that derives from (seed, k).
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
        """Return the examples of rollout number `rollout`, from 0."""
        first = rollout * self.count
        return [self._at(first + i) for i in range(self.count)]

    def _at(self, position: int) -> Example:
        number, index = divmod(position, len(self.items))
        if number not in self._passes:
            order = torch.randperm(len(self.items), generator=generator(self.seed, "prompts", number))
            self._passes = {number: order.tolist(), **dict(list(self._passes.items())[:1])}
        return self.items[self._passes[number][index]]
