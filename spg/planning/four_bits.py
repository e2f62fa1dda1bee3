"""Matrices of 4 bits without numbers, sized as bitsandbytes keeps them with double quantization."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spg.models.network import Network
from spg.planning.phantom import Phantom

# a scale for each 64 numbers takes a byte; 256 of these scales have one of their own, in float32
BLOCK, SCALES = 64, 256


class _Product(torch.autograd.Function):
    """x W^T, with W made from its 4 bits in either pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, unpack(packed, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (packed,) = ctx.saved_tensors
        return gradient @ unpack(packed, ctx.shape, gradient.dtype), None, None


def unpack(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return a matrix [out in] of 4-bit numbers in a wider type: one pass that reads and writes."""
    return packed.narrow(0, 0, 1).expand(shape).to(dtype, memory_format=torch.contiguous_format)


class FourBits(nn.Linear):
    """A linear layer whose weight is kept in 4 bits.

    Args:
        layer: The layer whose place it takes.
        dtype: Type of the products.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = dtype
        count = layer.weight.numel()
        size = count // 2 + count // BLOCK + 4 * (count // (BLOCK * SCALES) + 1)
        packed = Phantom(torch.empty(size, dtype=torch.uint8, device="meta"))
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with x [... in]."""
        shape = (self.out_features, self.in_features)
        result: Tensor = _Product.apply(x.to(self.dtype), self.weight, shape)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias


def put_in_four_bits(network: Network, dtype: torch.dtype) -> None:
    """Put 4-bit matrices in the place of the frozen ones in a network's layers."""
    for layer in network.layers:
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear and ".lora_" not in name:
                layer.set_submodule(name, FourBits(module, dtype))
