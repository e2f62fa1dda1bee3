"""Advantages: how good each completion is compared with others, rewards [P G] -> advantages [P G].

P prompts, G completions each. Each group is normalised on its own, unless a docstring says otherwise.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from spg.core.rules import Positive, checked


class Advantage(Protocol):
    """Maps the rewards of P prompts with G completions each onto advantages."""

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return advantages [P G] of `rewards` [P G]."""
        ...


class Raw:
    """The rewards themselves: REINFORCE without a baseline."""

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return advantages [P G] of `rewards` [P G]."""
        return rewards


class GroupMean:
    """Reward minus the group's mean, not divided by its spread (paper, Algorithm 1)."""

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return advantages [P G] of `rewards` [P G]."""
        return rewards - rewards.mean(-1, keepdim=True)


class LeaveOneOut:
    """Reward minus the mean of the group's others (RLOO); raises ValueError for a group of one."""

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return advantages [P G] of `rewards` [P G]."""
        size = rewards.shape[-1]
        if size < 2:
            raise ValueError(f"leave-one-out needs a group of 2 or more, got group_size={size}")
        return (rewards - rewards.mean(-1, keepdim=True)) * (size / (size - 1))


class Normalized:
    """Reward minus the group's mean, divided by its standard deviation plus `eps` (GRPO)."""

    @checked
    def __init__(self, eps: Positive = 1e-4) -> None:
        self.eps = eps

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return advantages [P G] of `rewards` [P G]."""
        centred = rewards - rewards.mean(-1, keepdim=True)
        return centred / (rewards.std(-1, keepdim=True) + self.eps)


class Shifted:
    """Another advantage minus its minimum over the batch, so that no advantage is negative (Table 7)."""

    def __init__(self, base: Advantage) -> None:
        self.base = base

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return advantages [P G] of `rewards` [P G]."""
        advantages = self.base(rewards)
        return advantages - advantages.min()
