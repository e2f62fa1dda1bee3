"""Root-mean-square normalisation by the one kernel that torch has for it on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which products of `x` [...] are computed: that of autocast, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, [... D], in the type of the products that it is for.

    The kernel computes in float32 and rounds once, where the CPU's separate operations round before the
    weight is applied too. Autocast would make a float32 copy of `x` first, and then one copy in its own type
    for each product.

    Args:
        x: Hidden states [... D].
        weight: Gains [D].
        eps: Added to the mean square.
    """
    wanted = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if weight.dtype == x.dtype:
            normal = F.rms_norm(x, weight.shape, weight, eps)
        else:
            normal = F.rms_norm(x, weight.shape, eps=eps) * weight
    return normal.to(wanted)
