"""Bidirectional attention with rotary positions and a cache, at the positions that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spg.models.network import Positions

# number of positions up to which plain products are faster than the fused kernel on a CPU
SHORT = 64


class _Rotate(torch.autograd.Function):
    """x cos + swap_halves(x) sin, with half as many passes over memory as separate operations need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(_swap_halves(x, sin), x, cos)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (gradient,) = gradients
        by_x = gradient * cos
        half = by_x.shape[-1] // 2
        by_x[..., half:] += gradient[..., :half] * sin[..., :half]
        by_x[..., :half] += gradient[..., half:] * sin[..., half:]
        return by_x, None, None


class _RotateHalfType(torch.autograd.Function):
    """The same from and to the type of x, with no float32 copies of x and of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        turned = torch.empty(x.shape, dtype=sin.dtype, device=x.device)
        torch.mul(x[..., half:], sin[..., :half], out=turned[..., :half])
        torch.mul(x[..., :half], sin[..., half:], out=turned[..., half:])
        return torch.addcmul(turned, x, cos, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (gradient,) = gradients
        by_x = gradient * cos
        half = by_x.shape[-1] // 2
        by_x[..., half:].addcmul_(gradient[..., :half], sin[..., :half])
        by_x[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        return by_x.to(gradient.dtype), None, None


def _swap_halves(x: Tensor, sin: Tensor) -> Tensor:
    """Return x [... d] with its two halves exchanged, times `sin` [... d]."""
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    torch.mul(x[..., half:], sin[..., :half], out=turned[..., :half])
    torch.mul(x[..., :half], sin[..., half:], out=turned[..., half:])
    return turned


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, in float32.

    Args:
        x: Queries or keys [N H L d]; component i is paired with component i + d / 2.
        cos: Cosines [... L d].
        sin: Sines [... L d], negated in the first half.

    Returns:
        The rotated x [N H L d], in the type of x.
    """
    if x.device.type != "cpu" and not torch.compiler.is_compiling():
        rotated: Tensor = _RotateHalfType.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    wide = x.float()
    if not torch.compiler.is_compiling():
        turned: Tensor = _Rotate.apply(wide, cos, sin)  # type: ignore[no-untyped-call]
        return turned.to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.addcmul(torch.cat([second, first], dim=-1) * sin, wide, cos).to(x.dtype)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v.

    On a CPU the fused kernel is made for long sequences: plain products take half its time on short ones.

    Args:
        q: Queries [N H Q d].
        k: Keys [N H L d].
        v: Values [N H L d].
        visible: True at the keys that queries may attend to [N 1 1 L], or what is added to their scores;
            None for all.

    Returns:
        Attended values [N H Q d].
    """
    if q.device.type != "cpu" or k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.matmul(scores.softmax(-1), v)


def attend(
    x: Tensor,
    normal: Tensor,
    query: Callable[[Tensor], Tensor],
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor],
    visible: Tensor | None,
    at: Positions | None,
    store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, Tensor]:
    """Let positions attend to all visible ones.

    Args:
        x: Hidden states [N W D].
        normal: Normalized hidden states [N W D].
        query: Makes the heads [N H K d] of K normalized hidden states.
        key: Keys [N G W d], not rotated yet; each serves H / G heads.
        value: Values [N G W d].
        rotary: Cosines and sines [W d].
        visible: True at the positions that may be attended to [N 1 1 L], or what is added to their scores;
            None for all.
        at: The S positions whose result is wanted; None for all.
        store: Stores keys and values in a cache and returns those of all L positions. Without it, W = L.

    Returns:
        The hidden states [N W D] and the attended values [N W H*d]; with `at` [S D] and [S H*d].
    """
    key = rotate(key, *rotary).to(value.dtype)
    if store is not None:
        key, value = store(key, value)
    if at is not None:
        cos, sin = (table[at.columns].unsqueeze(1) for table in rotary)
        rotary = (cos, sin)
        columns = at.columns.unsqueeze(-1)
        x, normal = (t.gather(1, columns.expand(-1, -1, t.shape[-1])) for t in (x, normal))
    # norms of heads may have another type than what autocast made of the projections
    rotated = rotate(query(normal), *rotary).to(value.dtype)
    repeats = rotated.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    attended = scaled_dot_product(rotated, key, value, visible).transpose(1, 2).flatten(2)
    return (x, attended) if at is None else (at.select(x), at.select(attended))
