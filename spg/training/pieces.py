"""How an update is cut into pieces: which masked copies of which sequences one forward pass computes.

The host plans all pieces from numbers that it reads from the device once, so that no piece waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from spg.core.combinations import Couples
from spg.core.devices import first_places
from spg.core.types import UpdateBatch


@dataclass(frozen=True)
class Piece:
    """Masked copies that are computed together.

    Attributes:
        rows: Number of each one's sequence [K].
        draws: Number of each one's draw [K].
        padding: Columns of padding that all of them have.
        padded: Whether any of them has more.
        scored: Number of each one's scored positions.
    """

    rows: Tensor
    draws: Tensor
    padding: int
    padded: bool
    scored: list[int]

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """The index of the copies in a tensor [B M ...]."""
        return self.rows, self.draws


@dataclass(frozen=True)
class Copies:
    """The S masked copies that an update computes, in the order of sequences, then of draws.

    Attributes:
        rows: Number of each one's sequence [S].
        draws: Number of each one's draw [S].
        counts: How many there are of each of the B sequences.
        paddings: Each sequence's columns of padding.
        groups: Each sequence's group number.
        scored: Number of each copy's scored positions.
    """

    rows: Tensor
    draws: Tensor
    counts: list[int]
    paddings: list[int]
    groups: list[int]
    scored: list[int]

    @classmethod
    def of(cls, batch: UpdateBatch, learned: Tensor) -> Copies:
        """Return the copies, of sequences that are `learned` from [B], that score any position."""
        rollout = batch.experience.rollout
        scored = batch.samples.scored.sum(-1) * learned.unsqueeze(-1)
        paddings = (~rollout.prompt_mask).sum(-1)
        columns = torch.stack([(scored > 0).sum(-1), paddings, rollout.group, *scored.T])
        counts, padding, groups, *numbers = columns.tolist()  # the device is waited for
        order = first_places((scored > 0).flatten(), sum(counts))
        own = [number for row in zip(*numbers, strict=True) for number in row if number]
        return cls(order // len(numbers), order % len(numbers), counts, padding, groups, own)

    def __len__(self) -> int:
        return len(self.rows)

    def cut(self, size: int | None) -> list[Piece]:
        """Return pieces of `size` copies and a last one of the rest; one of all if `size` is None."""
        step = size or max(1, len(self))
        return [self._piece(start, min(start + step, len(self))) for start in range(0, len(self), step)]

    def cut_whole(self, size: int, couples: Couples) -> list[tuple[slice, Piece]] | None:
        """Return pieces of at most `size` copies, each with all copies of some consecutive sequences.

        Args:
            size: Most copies in a piece.
            couples: What a piece must hold all copies of: a sequence or a group.

        Returns:
            The sequences of each piece, and the piece; None if there is no such cut: if the copies of one
            sequence or group are more than `size`, if a group's sequences are not consecutive, or if the
            whole batch belongs together.
        """
        units = [] if couples == "batch" else list(self._units(couples))
        consecutive = couples != "group" or len(units) == len(set(self.groups))
        if not (units and consecutive and max(count for _, count in units) <= size):
            return None
        found: list[tuple[slice, Piece]] = []
        first = start = held = 0  # of the current piece: first sequence, first copy, number of copies
        for rows, count in units:
            if held + count > size:
                found.append((slice(first, rows.start), self._piece(start, start + held)))
                first, start, held = rows.start, start + held, 0
            held += count
        return [*found, (slice(first, len(self.counts)), self._piece(start, start + held))]

    def _units(self, couples: Couples) -> Iterator[tuple[slice, int]]:
        """Yield consecutive sequences that must stay together, and the number of their copies."""
        first = 0
        names = self.groups if couples == "group" else range(len(self.counts))
        for _, members in groupby(names):
            rows = slice(first, first + len(list(members)))
            yield rows, sum(self.counts[rows])
            first = rows.stop

    def _piece(self, start: int, stop: int) -> Piece:
        """Return the copies from number `start` to `stop`."""
        paddings = {self.paddings[row] for row in self._sequences[start:stop]}
        fewest = min(paddings, default=0)
        place = slice(start, stop)
        return Piece(self.rows[place], self.draws[place], fewest, len(paddings) > 1, self.scored[place])

    @cached_property
    def _sequences(self) -> list[int]:
        """Number of each copy's sequence, on the host."""
        return [row for row, count in enumerate(self.counts) for _ in range(count)]
