"""What a policy needs of a network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn


class Network(nn.Module):
    """Token ids to hidden states to logits, in two steps: the head runs only where it is asked for.

    lora_targets: regular expressions of the matrices that an adapter may train, by the names
    `released` and `all`.
    """

    lora_targets: ClassVar[Mapping[str, str]]

    @abstractmethod
    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Return hidden states [N L D] of ids [N L]; attention_mask [N L] is True at real tokens.

        at [N L]: True at the S positions whose states are wanted, row after row: the result is then
        [S D], and a network may skip work for the others.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [... V] of hidden states [... D]."""
