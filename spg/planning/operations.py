"""How many multiplications and additions an operation takes, and which operations take no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _mm(args: Sequence[Any], results: Sequence[Tensor]) -> int:
    return 2 * results[0].numel() * args[0].shape[-1]


def _addmm(args: Sequence[Any], results: Sequence[Tensor]) -> int:
    return 2 * results[0].numel() * args[1].shape[-1]


def _attention(args: Sequence[Any], results: Sequence[Tensor]) -> int:
    """Scores, then their product with the values."""
    return _of_scores(2, *args[:3])


def _attention_backward(args: Sequence[Any], results: Sequence[Tensor]) -> int:
    """The scores again, and the derivatives of both products by both factors."""
    return _of_scores(5, *args[1:4])


def _of_scores(products: int, query: Tensor, key: Tensor, value: Tensor) -> int:
    return 2 * products * query.numel() * key.shape[-2]


PRODUCTS: dict[str, Callable[[Sequence[Any], Sequence[Tensor]], int]] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "addmm_": _addmm,
    "baddbmm": _addmm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}

# they make a tensor or say something about one, and compute nothing
IDLE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"}
IDLE |= {"detach", "_unsafe_view", "is_same_size", "_has_compatible_shallow_copy_type", "_fused_sdp_choice"}


@cache
def is_free(func: Any) -> bool:
    """Return whether an operation only gives another view of its argument, or computes nothing."""
    name = func._schema.name.partition("::")[2]
    returns = func._schema.returns
    views = [r.alias_info is not None and not r.alias_info.is_write for r in returns]
    return name in IDLE or (bool(views) and all(views))


def count_operations(func: Any, args: Sequence[Any], results: Sequence[Tensor]) -> int:
    """Return the multiplications and additions of a matrix product or of attention, 0 of anything else.

    Args:
        func: The operation, of torch.ops.aten.
        args: Its arguments.
        results: The tensors [...] that it returns.
    """
    name = func._schema.name.partition("::")[2].removesuffix("_")  # in place too
    return PRODUCTS[name](args, results) if name in PRODUCTS else 0
