"""What a policy needs of a network."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spg.models.head import token_logps


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


class Slot:
    """Keys and values of one layer, [N H L d]; see `Cache`."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.start = 0  # where the positions of the pass begin

    # outside of what torch.compile traces: it would compile each layer anew for its own keys and values
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [N H W d] of the pass's positions in place; return all of the layer's."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            place = slice(self.start, self.start + keys.shape[2])
            self.keys[:, :, place], self.values[:, :, place] = keys, values
        return self.keys, self.values


class Cache:
    """Keys and values of N rows and L positions that decoding goes on with.

    A pass over all L positions fills it; a pass over some of them puts theirs in place and sees the rest as
    they were.
    """

    def __init__(self) -> None:
        self._slots: list[Slot] = []

    @property
    def filled(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self._slots)

    def clear(self) -> None:
        """Forget everything: the next pass has to be over all positions."""
        self._slots.clear()

    def select(self, rows: Tensor) -> None:
        """Go on with the rows at `rows` [M], in that order; one may be named several times."""
        for slot in self._slots:
            assert slot.keys is not None
            assert slot.values is not None
            slot.keys, slot.values = slot.keys[rows], slot.values[rows]

    def slot(self, layer: int, start: int) -> Slot:
        """Return the slot of a layer, from the first on, for a pass over positions from `start` on."""
        if layer == len(self._slots):
            self._slots.append(Slot())
        self._slots[layer].start = start
        return self._slots[layer]


class Network(nn.Module):
    """Token ids to hidden states to logits, in two steps: the head runs only where it is asked for.

    lora_targets: regular expressions of the matrices that an adapter may train, by the names
    `released` and `all`. into_residual: of the parameters that write into the residual stream.
    checkpointing: keep only what enters each layer for the backward pass, and compute the layer again there.
    """

    lora_targets: ClassVar[Mapping[str, str]]
    into_residual: ClassVar[str]
    published_sizes: ClassVar[Sequence[str]] = ()
    published_implied: ClassVar[Mapping[str, str]] = {}
    published_fixed: ClassVar[Mapping[str, Sequence[Any]]] = {}
    checkpointing: bool = False

    def __init__(self) -> None:
        super().__init__()
        # outside of the module's buffers, which a move to bfloat16 would round and the meta device would lose
        self._rotary: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        at: Places | None = None,
        cache: Cache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return the final hidden states [N W D] of ids [N W], the positions from `start` on of L.

        attention_mask [N L]: True at real tokens; None: nothing is padded. Padding is seen by no position,
        and rotary positions are relative, so that a padded row equals the row alone. cache: holds the other
        positions' keys and values and takes these ones'; without it, or where it is not filled, W = L and
        start = 0. at: the S of the W positions whose states are wanted; the result is then [S D], and the
        last layer, whose other positions are seen by nobody, is computed for these alone.
        """
        x: Tensor = self.embedding(ids)
        stop = start + ids.shape[1]
        cos, sin = self._rotary_tables(stop, ids.device)
        rotary = (cos[start:stop], sin[start:stop])
        visible = None if attention_mask is None else attention_mask[:, None, None, :]
        for number, layer in enumerate(self.layers):
            put = None if cache is None else cache.slot(number, start).put
            places = at if number == len(self.layers) - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, visible, places, put, use_reentrant=False)
            else:
                x = layer(x, rotary, visible, places, put)
        final: Tensor = self.norm(x)
        return final

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [L d] of at least `length` positions, made anew for the longest so far."""
        if device not in self._rotary or len(self._rotary[device][0]) < length:
            positions = torch.arange(length, device=device, dtype=torch.float)
            angles = torch.outer(positions, self.frequencies(device))
            cos, sin = angles.cos(), angles.sin()
            self._rotary[device] = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))
        return self._rotary[device]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights from `seed`, the same on any device: an adapter may go on with them elsewhere.

        Matrices are normal with deviation 1 / sqrt(inputs), those that write into the residual stream divided
        by sqrt(2 * layers); gains are 1.
        """
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * len(self.layers)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
                continue
            std = parameter.shape[1] ** -0.5 / (depth if re.fullmatch(self.into_residual, name) else 1)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    @abstractmethod
    def frequencies(self, device: torch.device) -> Tensor:
        """Return the rotary frequencies [d / 2], in float32, in radians a position."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Module:
        """The module that turns ids [N W] into hidden states [N W D]."""

    @property
    @abstractmethod
    def norm(self) -> nn.Module:
        """The normalisation after the last layer."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The module that turns hidden states [... D] into logits [... V]; a linear layer without bias."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The transformer's layers, from the first to the last.

        Each maps (hidden states [N W D], rotary tables, visible, at, put); see `attention.look`.
        """

    @abstractmethod
    def published_config(self) -> dict[str, Any]:
        """Return the fields of a config.json in the published layout, but those of the tokenizer."""

    @property
    def head_width(self) -> int:
        """Number of rows of the head, V; not all of them need to belong to a token."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return len(weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [... V] of hidden states [... D]."""
        logits: Tensor = self.head(hidden)
        return logits

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return log softmax(logits) at the targets [S], in float32, of hidden states [S D]."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return token_logps(hidden, weight, targets)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Have torch compile the layers at their first use, one program for all sizes of a kind of pass."""
        for layer in self.layers:
            layer.compile(dynamic=True, backend=backend)
