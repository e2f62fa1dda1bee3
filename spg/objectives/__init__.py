"""Objectives: from token log-probabilities to a loss, one method a file."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from spg.types import Experience, MaskedSamples


class Objective(Protocol):
    """What the update minimises.

    `learns_from` says which sequences [B] need log-probabilities at all; the others get zeros for
    theirs but still count in every normaliser.
    """

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: True where the sequence's log-probabilities can change the loss."""
        ...

    def __call__(
        self, token_logps: Tensor, samples: MaskedSamples, experience: Experience
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss [], metrics) from log-probabilities [B M T] of the samples."""
        ...
