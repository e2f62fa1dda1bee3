"""Operations that only a GPU has, and the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, attn_mask=bias, scale=scale
    )
    # a GPU lays the heads of a position beside each other
    return out.transpose(1, 2).contiguous().transpose(1, 2), logsumexp


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    logsumexp: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    seed = torch.zeros((), dtype=torch.long)
    return (*_attention(query, key, value, bias, dropout, causal, scale), seed, seed.clone())


def _efficient_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: Sequence[bool],
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, out, logsumexp, dropout, causal, attn_mask=bias, scale=scale
    )
    return (*gradients, None)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    out, logsumexp = _attention(query, key, value, None, dropout, causal, scale)
    seed = torch.zeros((), dtype=torch.long)
    lengths = query.shape[-2], key.shape[-2]
    return (out, logsumexp, None, None, *lengths, seed, seed.clone(), out.new_empty(0))


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *rest: Any,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    dropout, causal = rest[4], rest[5]
    gradients: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, out, logsumexp, dropout, causal, attn_mask=None, scale=scale
    )
    return gradients


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = x.float() * scale
    return (normal if weight is None else normal * weight).to(x.dtype), scale


def _rms_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    weight: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    normal, by_result = x.float() * scale, gradient.float()
    by_normal = by_result if weight is None else by_result * weight
    by_x = (by_normal - normal * (by_normal * normal).mean(-1, keepdim=True)) * scale
    by_weight = None if weight is None else (by_result * normal).flatten(0, -2).sum(0).to(weight.dtype)
    return by_x.to(x.dtype) if wanted[0] else None, by_weight if wanted[1] else None


# by their names
ON_CPU: dict[str, Callable[..., Any]] = {
    "aten._scaled_dot_product_efficient_attention.default": _efficient,
    "aten._scaled_dot_product_efficient_attention_backward.default": _efficient_backward,
    "aten._scaled_dot_product_flash_attention.default": _flash,
    "aten._scaled_dot_product_flash_attention_backward.default": _flash_backward,
    "aten._fused_rms_norm.default": _rms_norm,
    "aten._fused_rms_norm_backward.default": _rms_norm_backward,
    "aten.silu_backward.default": torch.ops.aten.silu_backward.default,
}

# Their CPU build decomposes these before an operation is seen; a kernel of the device, which is never called,
# makes them stay whole, as in the CUDA build.
_WHOLE = ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward")
_library = torch.library.Library("aten", "IMPL")
for _name in _WHOLE:
    _library.impl(_name, ON_CPU[f"aten.{_name}.default"], "CUDA")
