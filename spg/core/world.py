"""The processes that share a run: which of them this one is, and what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Describes the processes of a run; by default there is one.

    All processes must call the methods that gather, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def stretch(self, count: int) -> range:
        """Return the numbers of this process among `count` items.

        Every item belongs to one process, the processes' stretches follow each other in the order of ranks,
        and their lengths differ by at most 1.
        """
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this process, its `stretch` of them."""
        own = self.stretch(len(items))
        return items[own.start : own.stop]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the order of ranks.

        Args:
            rows: This process's rows [B ...], of the same shape in all processes; they pass no gradient on.

        Returns:
            All rows [N ...], N = B * size.
        """
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    def gather_items(self, items: Sequence[T]) -> list[T]:
        """Return the items of all processes in the order of ranks; their numbers may differ."""
        if self.size == 1:
            return list(items)
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]
