"""The optimizer of reinforcement learning: AdamW, linear warm-up, then a constant learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from spg.config.settings import Optimization


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], numbers: Optimization
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Return AdamW with the groups `decay` (matrices) and `no_decay`, and its warm-up."""
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": numbers.weight_decay, "name": "decay"},
            {"params": others, "weight_decay": 0.0, "name": "no_decay"},
        ],
        lr=numbers.lr,
        betas=(numbers.betas[0], numbers.betas[1]),
        fused=True,
    )
    warmup = numbers.warmup_updates
    return optimizer, LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / (warmup + 1)))


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of `parameters` [...] down to `max_norm` together; return their norm before, []."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # nothing was learned; torch would return a number of the CPU
        return torch.zeros((), device=parameters[0].device)
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
