"""Objectives: from token log-probabilities to a loss, one method a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from spg.core.types import Cohort, Experience, MaskedSamples


class Objective(Protocol):
    """What the update minimises.

    `needs` names what must be computed beside the policy's log-probabilities: `reference`, those of
    the model before training; `old`, those of the policy that made the rollout. `learns_from` says which
    sequences [B] need log-probabilities at all; the others get zeros for theirs but still count in every
    normaliser.
    """

    needs: frozenset[str]

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: True where the sequence's log-probabilities can change the loss."""
        ...

    def __call__(
        self,
        token_logps: Tensor,
        samples: MaskedSamples,
        experience: Experience,
        cohort: Cohort | None = None,
        reference: Tensor | None = None,
        old: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss [], figures {name: [B]}) from log-probabilities [B M T] of the samples.

        With a cohort of several processes the loss is this process's share, so that the shares' sum
        is the loss of all. Figures hold for the sequences that are learned from. reference [B M T]:
        the reference model's log-probabilities, where `needs` names them. old [B M T]: those of the
        policy that made the rollout, under the same masks; None where it still is that policy.
        """
        ...


@runtime_checkable
class Adaptive(Protocol):
    """What an objective has beside `Objective` if it learns numbers of its own between updates."""

    def adapt(self, means: Mapping[str, float]) -> dict[str, float]:
        """Learn, after an update's step, from its figures' means over all sequences; return what to log."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of what was learned."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state` back; an empty one is that of a new objective."""
        ...
