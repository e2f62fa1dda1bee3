"""What a policy needs of a network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Places:
    """Positions of a batch whose hidden states are wanted, as many columns for each row.

    columns [N K]: ascending in each row, filled up with others where a row wants fewer than K. wanted [S]:
    which of the N * K are wanted, row after row; None: all of them, S = N * K.
    """

    columns: Tensor
    wanted: Tensor | None = None

    @classmethod
    def of(cls, at: Tensor) -> Self:
        """Return the True positions of `at` [N L]; waits for the device, to learn how many there are."""
        most = max(1, int(at.sum(-1).max()))
        columns = at.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
        return cls(columns, at.gather(1, columns).flatten().nonzero().flatten())

    def take(self, states: Tensor) -> Tensor:
        """Return [S D], the wanted ones of states [N K D]."""
        flat = states.flatten(0, 1)
        return flat if self.wanted is None else flat[self.wanted]


@dataclass
class Cache:
    """Keys and values of N rows and L positions, [N H L d] a layer, that decoding goes on with.

    A pass over all L positions fills it; a pass over some of them puts theirs in place and sees the rest as
    they were.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def filled(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self.keys)

    def clear(self) -> None:
        """Forget everything: the next pass has to be over all positions."""
        self.keys.clear()
        self.values.clear()

    def put(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [N H W d] of the positions from `start` on; return all of the layer's."""
        if layer == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
            return keys, values
        stop = start + keys.shape[2]
        self.keys[layer][:, :, start:stop] = keys
        self.values[layer][:, :, start:stop] = values
        return self.keys[layer], self.values[layer]


class Network(nn.Module):
    """Token ids to hidden states to logits, in two steps: the head runs only where it is asked for.

    lora_targets: regular expressions of the matrices that an adapter may train, by the names
    `released` and `all`. checkpointing: keep only what enters each layer for the backward pass, and compute
    the layer again there.
    """

    lora_targets: ClassVar[Mapping[str, str]]
    checkpointing: bool = False

    @abstractmethod
    def hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        at: Places | None = None,
        cache: Cache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return hidden states [N W D] of ids [N W], the positions from `start` on of L.

        attention_mask [N L]: True at real tokens; None: nothing is padded. cache: holds the other
        positions' keys and values and takes these ones'; without it, or where it is not filled, W = L and
        start = 0. at: the S of the W positions whose states are wanted; the result is then [S D], and a
        network may skip work for the others.
        """

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The module that turns hidden states [... D] into logits [... V]; a linear layer without bias."""

    @property
    @abstractmethod
    def layers(self) -> Iterable[nn.Module]:
        """The transformer's layers, from the first to the last."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [... V] of hidden states [... D]."""
        logits: Tensor = self.head(hidden)
        return logits

    def compile_layers(self) -> None:
        """Have torch compile each layer at its first use, again for every new shape of its input."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for layer in self.layers:
            layer.compile(dynamic=True)
