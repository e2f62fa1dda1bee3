"""Attention that looks both ways, over rotary positions, a cache, and only the positions that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spg.models.network import Places

SHORT = 64  # positions up to which plain attention is the faster one on CPU


class _Rotate(torch.autograd.Function):
    """x cos + swapped(x) sin, in half the composite's passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(_swapped(x, sin), x, cos)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (gradient,) = gradients
        by_x = gradient * cos
        half = by_x.shape[-1] // 2
        by_x[..., half:] += gradient[..., :half] * sin[..., :half]
        by_x[..., :half] += gradient[..., half:] * sin[..., half:]
        return by_x, None, None


def _swapped(x: Tensor, sin: Tensor) -> Tensor:
    """Return x [... d] with its halves in each other's place, times `sin` [... d]."""
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    torch.mul(x[..., half:], sin[..., :half], out=turned[..., :half])
    torch.mul(x[..., :half], sin[..., half:], out=turned[..., half:])
    return turned


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [N H L d] with tables [... L d], in float32, halves paired.

    `sin` carries the sign of the first half.
    """
    wide = x.float()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        turned: Tensor = _Rotate.apply(wide, cos, sin)  # type: ignore[no-untyped-call]
        return turned.to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.addcmul(torch.cat([second, first], dim=-1) * sin, wide, cos).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v [N H Q d] of q [N H Q d] and k, v [N H L d].

    visible [N 1 1 L]: True at keys that may be seen, or None. On CPU the fused kernel is made for long
    sequences: on short ones plain products take half its time.
    """
    if q.device.type != "cpu" or k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.matmul(scores.softmax(-1), v)


def look(
    x: Tensor,
    normal: Tensor,
    query: Callable[[Tensor], Tensor],
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor],
    visible: Tensor | None,
    at: Places | None,
    put: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, Tensor]:
    """Return the hidden states x [N W D] and what their positions see [N W H*d], or both [S ...] at `at`.

    normal [N W D]: x, normalised; query makes heads [N H K d] of some of it. key, value [N G W d], not turned
    yet, of which each serves H / G heads. rotary: tables [W d]. visible [N 1 1 L]: True at positions that may
    be seen. put: stores keys and values in a cache and returns those of all L positions; without it, W = L.
    """
    key = rotate(key, *rotary).to(value.dtype)
    if put is not None:
        key, value = put(key, value)
    if at is not None:
        cos, sin = (table[at.columns].unsqueeze(1) for table in rotary)
        rotary = (cos, sin)
        columns = at.columns.unsqueeze(-1)
        x, normal = (t.gather(1, columns.expand(-1, -1, t.shape[-1])) for t in (x, normal))
    # where norms of heads have another type than what autocast made of the projections
    turned = rotate(query(normal), *rotary).to(value.dtype)
    repeats = turned.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    seen = attend(turned, key, value, visible).transpose(1, 2).flatten(2)
    return (x, seen) if at is None else (at.take(x), at.take(seen))
