"""What a policy needs from a network: hidden states at chosen positions, and a head apart from them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spg.core.devices import first_places
from spg.models.head import token_logps
from spg.models.norm import compute_dtype

# elements that the rows of a mask must begin at a multiple of
ALIGNMENT = 16


@dataclass(frozen=True)
class Positions:
    """Positions of a batch whose hidden states are wanted, with equally many columns for each row.

    Attributes:
        columns: Positions in each row [N K], ascending. A row that wants fewer is filled up with others.
        wanted: Which of the N * K positions are wanted, row after row [S]; None for all, S = N * K.
    """

    columns: Tensor
    wanted: Tensor | None = None

    @classmethod
    def of_mask(cls, at: Tensor, counts: Sequence[int] | None = None) -> Self:
        """Return the True positions of `at` [N L].

        Args:
            at: True at the wanted positions.
            counts: Number of them in each of the N rows; None to read it, for which the device is waited for.
        """
        known = at.sum(-1).tolist() if counts is None else counts
        most = max(1, *known)
        columns = at.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
        if min(known) == most:
            return cls(columns)
        return cls(columns, first_places(at.gather(1, columns).flatten(), sum(known)))

    def places(self, length: int, first: int = 0) -> Tensor:
        """Return the wanted ones' numbers [S] among the N * `length` positions from column `first` on."""
        rows = torch.arange(0, len(self.columns) * length, length, device=self.columns.device)
        numbers = (self.columns + (rows - first).unsqueeze(-1)).flatten()
        return numbers if self.wanted is None else numbers[self.wanted]

    def select(self, states: Tensor) -> Tensor:
        """Return the wanted ones [S D] of states [N K D]."""
        flat = states.flatten(0, 1)
        return flat if self.wanted is None else flat[self.wanted]


class Slot:
    """Keys and values of one layer, [N H L d]; see `Cache`. A compiled layer calls it within its program."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.start = 0  # first position of the current pass

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [N H W d] of the current pass; return those of all L positions."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            place = slice(self.start, self.start + keys.shape[2])
            self.keys[:, :, place], self.values[:, :, place] = keys, values
        return self.keys, self.values


class Cache:
    """Keys and values of N rows and L positions, which decoding uses again.

    A pass over all L positions fills the cache. A pass over some positions replaces theirs, and attends to
    the others as they were.
    """

    def __init__(self) -> None:
        self._slots: list[Slot] = []

    @property
    def filled(self) -> bool:
        """Whether there are keys and values."""
        return bool(self._slots)

    def clear(self) -> None:
        """Drop all keys and values: the next pass has to be over all positions."""
        self._slots.clear()

    def select(self, rows: Tensor) -> None:
        """Keep the rows at `rows` [M], in that order; a row may be repeated."""
        for slot in self._slots:
            assert slot.keys is not None
            assert slot.values is not None
            slot.keys, slot.values = slot.keys[rows], slot.values[rows]

    def slot(self, layer: int, start: int) -> Slot:
        """Return the slot of a layer for a pass over positions from `start` on; ask for layers in order."""
        if layer == len(self._slots):
            self._slots.append(Slot())
        self._slots[layer].start = start
        return self._slots[layer]


def _visible(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention gets as its mask [N 1 1 L], made once for all layers.

    On a GPU it is what is added to the scores, in the type of the products, with rows that begin where the
    kernel wants them: from booleans, or other rows, each layer would make this anew.
    """
    mask = attention_mask[:, None, None, :]
    if mask.device.type == "cpu":
        return mask
    length = mask.shape[-1]
    room = torch.zeros(*mask.shape[:-1], -(-length // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=mask.device)
    return room[..., :length].masked_fill_(~mask, -torch.inf)


class Network(nn.Module):
    """Token ids to hidden states to logits, in two steps: the head runs only for the positions asked for.

    Attributes:
        lora_targets: Regular expressions of the matrices that an adapter may train, by the names `released`
            and `all`.
        into_residual: Regular expression of the parameters that write into the residual stream.
        published_sizes: Fields of a published config.json that give the sizes; see `spg.models.hub`.
        published_implied: Sizes that follow from other fields.
        published_fixed: Fields, and the values that the class can compute with.
        checkpointing: Keep only the input of each layer for the backward pass, and compute the layer again.
    """

    lora_targets: ClassVar[Mapping[str, str]]
    into_residual: ClassVar[str]
    published_sizes: ClassVar[Sequence[str]] = ()
    published_implied: ClassVar[Mapping[str, str]] = {}
    published_fixed: ClassVar[Mapping[str, Sequence[Any]]] = {}
    checkpointing: bool = False

    def __init__(self) -> None:
        super().__init__()
        # no buffer of the module: a move to bfloat16 would round it, and the meta device would lose it
        self._rotary: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        at: Positions | None = None,
        cache: Cache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return the final hidden states of W positions, of which no other position sees the padding.

        Rotary positions are relative, so that a padded row gives the same as the row alone.

        Args:
            ids: Token ids of the positions from `start` on [N W].
            attention_mask: True at real tokens [N L]; None if nothing is padded.
            at: The S of the W positions whose states are wanted. The last layer is computed for these only.
            cache: Holds keys and values of the other positions, and stores those of these ones. Without it,
                or if it is not filled, W = L and start = 0.
            start: First of the W positions.

        Returns:
            Hidden states [N W D], or [S D] with `at`.
        """
        x: Tensor = self.embedding(ids)
        stop = start + ids.shape[1]
        cos, sin = self._rotary_tables(stop, ids.device)
        rotary = (cos[start:stop], sin[start:stop])
        visible = None if attention_mask is None else _visible(attention_mask, compute_dtype(x))
        for number, layer in enumerate(self.layers):
            store = None if cache is None else cache.slot(number, start)
            wanted = at if number == len(self.layers) - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, visible, wanted, store, use_reentrant=False)
            else:
                x = layer(x, rotary, visible, wanted, store)
        final: Tensor = self.norm(x)
        return final

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [L d] of at least `length` positions, as many as ever needed."""
        if device not in self._rotary or len(self._rotary[device][0]) < length:
            positions = torch.arange(length, device=device, dtype=torch.float)
            angles = torch.outer(positions, self.frequencies(device))
            cos, sin = angles.cos(), angles.sin()
            self._rotary[device] = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))
        return self._rotary[device]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights from `seed`, the same on any device, so that an adapter fits them anywhere.

        Matrices are normal with deviation 1 / sqrt(inputs), divided by sqrt(2 * layers) if they write into
        the residual stream; gains are 1.
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

        Each maps (hidden states [N W D], rotary tables, visible, at, store); see
        `spg.models.attention.attend`.
        """

    @abstractmethod
    def published_config(self) -> dict[str, Any]:
        """Return the fields of a published config.json, without those of the tokenizer."""

    @property
    def head_width(self) -> int:
        """Number of rows of the head, V; rows beyond the tokens are allowed."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return len(weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [... V] of hidden states [... D]."""
        logits: Tensor = self.head(hidden)
        return logits

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return log softmax(logits) [S] at the targets [S], in float32, of hidden states [S D]."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return token_logps(hidden, weight, targets)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch compile the layers at their first use, one program for all sizes of a kind of pass.

        Kinds are passes with gradients or without, with padding or without, that fill a cache, use one or
        have none, in the last layer or before it, of one row or several, at one position of a row or several.
        Settings of torch that hold for the whole process change.
        """
        from torch._dynamo import config as compiler  # takes a second
        from torch.fx.experimental import _config as shapes

        # numbers of rows and of positions that are equal by chance are not the same number
        shapes.use_duck_shape = False
        # beyond this many programs torch would compute without compiling, and 8 are fewer than the kinds
        compiler.recompile_limit = max(compiler.recompile_limit, 64)
        for layer in self.layers:
            layer.compile(dynamic=True, backend=backend)
