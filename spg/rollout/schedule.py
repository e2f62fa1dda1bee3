"""How many tokens each decoding step commits: numbers fixed beforehand, or what the confidence allows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def transfer_counts(holes: Tensor, steps: int) -> Tensor:
    """Spread `holes` [B] over steps as evenly as whole numbers allow, the larger numbers first; [B steps]."""
    base, rest = holes // steps, holes % steps
    return base.unsqueeze(-1) + (torch.arange(steps, device=holes.device) < rest.unsqueeze(-1))


@dataclass(frozen=True)
class Turn:
    """One step of a block.

    Attributes:
        step: Number of the step in its block.
        rows: Numbers of the N rows that are computed.
        left: Largest number of open positions of a row in the block.
        counts: Number of tokens that each row commits [N 1]; None if the confidence decides.
    """

    step: int
    rows: list[int]
    left: int
    counts: list[list[int]] | None = None


class Schedule(ABC):
    """The steps that the blocks of a batch take.

    Attributes:
        steps: Largest number of steps of a block. Step s of block b has the number b * steps + s.
    """

    steps: int

    @abstractmethod
    def turns(self, number: int, active: Sequence[int], together: bool) -> Iterator[Turn]:
        """Yield the steps of a block, each after the one before it was computed.

        Args:
            number: Number of the block.
            active: Rows that are not done.
            together: Whether every row takes all steps of the block, as a cache needs it. Otherwise rows
                with nothing to commit are left out.
        """


class FixedCounts(Schedule):
    """Commits numbers of tokens that follow from the number of holes and of steps alone.

    Args:
        holes: Number of holes in each block [B blocks], on the CPU.
        steps: Steps of a block.
    """

    def __init__(self, holes: Tensor, steps: int) -> None:
        self.steps = steps
        self._counts = torch.stack([transfer_counts(column, steps) for column in holes.T], dim=1).tolist()

    def turns(self, number: int, active: Sequence[int], together: bool) -> Iterator[Turn]:
        """Yield the steps in which some row has a token to commit."""
        plan = {row: self._counts[row][number] for row in active if any(self._counts[row][number])}
        for step in (s for s in range(self.steps) if any(counts[s] for counts in plan.values())):
            rows = [row for row, counts in plan.items() if together or counts[step]]
            left = max(sum(plan[row][step:]) for row in rows)
            yield Turn(step, rows, left, [[plan[row][step]] for row in rows])


class WhileOpen(Schedule):
    """Goes on with a block until nothing is open; the confidence decides what each step commits.

    Args:
        holes: Number of holes in each block [B blocks], on the CPU.
        still_open: Positions that are not committed yet [B T]; decoding changes it in place.
        blocks: The positions of each block.
    """

    def __init__(self, holes: Tensor, still_open: Tensor, blocks: Sequence[slice]) -> None:
        self.steps = max(block.stop - block.start for block in blocks)
        self._holes = holes.tolist()
        self._open = still_open
        self._blocks = blocks

    def turns(self, number: int, active: Sequence[int], together: bool) -> Iterator[Turn]:
        """Yield steps until no row has an open position; the device is waited for once after each."""
        left = {row: self._holes[row][number] for row in active if self._holes[row][number]}
        for step in range(self.steps):
            if not any(left.values()):
                return
            yield Turn(step, [row for row, n in left.items() if together or n], max(left.values()))
            counts = self._open[:, self._blocks[number]].sum(-1).tolist()
            left = {row: counts[row] for row in left}


@dataclass(frozen=True)
class ConfidenceRule:
    """Commits the most confident position, and more in the order of their confidence c (Fast-dLLM).

    With a threshold, every position with c above it is committed. With a factor f, position n of that order
    is committed if c > 1 - f / (n + 1) holds for it and for all before it (the paper's dynamic rule). As in
    the released code, the last open position of a block is committed together with all others.

    Attributes:
        threshold: Between 0 and 1; None for the factor.
        factor: f; None for the threshold.
    """

    threshold: float | None = None
    factor: float | None = None

    def counts(self, confidence: Tensor) -> Tensor:
        """Return how many positions to commit [N 1].

        Args:
            confidence: Of each position [N K]; -inf at those that are not open.
        """
        ranked = confidence.sort(dim=-1, descending=True).values
        allowed = self._allowed(ranked).cumprod(-1).sum(-1, keepdim=True)
        return self._with_the_last(allowed, ranked)

    def close_calls(self, confidence: Tensor, within: float) -> Tensor:
        """Return how many positions lie no further from their bound than `within`, up to the first below it.

        Args:
            confidence: As for `counts`.
            within: A difference in confidence.

        Returns:
            [N].
        """
        ranked = confidence.sort(dim=-1, descending=True).values
        allowed = self._allowed(ranked)
        reached = allowed.cumprod(-1).roll(1, -1).bool()  # all before it are committed
        reached[:, 0] = False  # the most confident one is always committed
        if self.factor is not None:
            reached &= ~self._is_last(ranked)
        return (reached & ((ranked - self._bounds(ranked)).abs() <= within)).sum(-1)

    def _bounds(self, ranked: Tensor) -> Tensor:
        """Return what the confidence has to exceed at each rank [K]."""
        rank = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
        if self.factor is not None:
            return 1 - self.factor / (rank + 1)
        assert self.threshold is not None
        return torch.full_like(rank, self.threshold, dtype=ranked.dtype)

    def _allowed(self, ranked: Tensor) -> Tensor:
        """Return 1 at the ranks [N K] whose confidence is enough by itself, and 0 elsewhere."""
        allowed = (ranked > self._bounds(ranked)).long()
        allowed[:, 0] = 1
        return allowed

    def _is_last(self, ranked: Tensor) -> Tensor:
        """Return whether a rank is that of the least confident open position [N K]."""
        still_open = ranked.isfinite()
        return still_open & (still_open.cumsum(-1) == still_open.sum(-1, keepdim=True))

    def _with_the_last(self, counts: Tensor, ranked: Tensor) -> Tensor:
        if self.factor is None:
            return counts
        number = ranked.isfinite().sum(-1, keepdim=True)
        return torch.where(counts + 1 == number, number, counts)
