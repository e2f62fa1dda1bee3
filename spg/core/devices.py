"""Moving tensors to a device, and choosing among its values, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor [...] of the CPU on a device, without waiting for the copy to a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def first_places(hits: Tensor, number: int) -> Tensor:
    """Return where `hits` [N] is True, as `nonzero` does; the caller knows the `number` of places."""
    return hits.byte().argsort(descending=True, stable=True)[:number]
