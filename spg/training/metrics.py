"""What a run logs of its rollouts and updates, as means over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.algorithms.objectives import ObjectiveResult
from spg.core.types import Experience, UpdateBatch
from spg.core.world import World
from spg.rollout.collect import CollectionStats


def rollout_metrics(
    experience: Experience, timing: CollectionStats, group_size: int, eos_id: int, world: World
) -> dict[str, float]:
    """Return a rollout's metrics: means over the completions of all processes, and this process's times."""
    rollout = experience.rollout
    # a template that ends in a given token is complete without EOS
    ended = (rollout.completion_ids == eos_id).any(-1) | rollout.given[:, -1]
    own = {
        "reward": experience.rewards,
        "completions/mean_length": rollout.lengths,
        "completions/clipped_ratio": ~ended,
        **{f"rewards/{name}/mean": part for name, part in experience.reward_parts.items()},
    }
    if timing.logp_difference is not None:
        own["sampling/logp_difference"] = timing.logp_difference
    if timing.steps is not None:
        own["sampling/steps"] = timing.steps
    rows = world.gather(torch.stack([row.float() for row in own.values()], 1))
    spread = rows[:, 0].view(-1, group_size).std(-1)
    tokens = world.gather(timing.tokens.view(1)).sum()
    spreads = torch.stack([spread.mean(), (spread == 0).float().mean()])
    # in float64, which holds every number of tokens; the device is waited for once
    *values, mean_spread, without_spread, decoded = torch.cat(
        [rows.mean(0).double(), spreads.double(), tokens.double().view(1)]
    ).tolist()
    means = dict(zip(own, values, strict=True))
    if timing.steps is not None:
        means["sampling/tokens_per_step"] = decoded / max(1.0, means["sampling/steps"] * len(rows))
    return {
        **means,
        "reward_std": mean_spread,
        "frac_reward_zero_std": without_spread,
        "time/rollout": timing.rollout,
        "time/reward": timing.reward,
        "throughput/tokens_per_s": decoded / timing.rollout,
    }


def update_metrics(
    result: ObjectiveResult, batch: UpdateBatch, learned: Tensor, norm: Tensor, world: World
) -> tuple[dict[str, float], dict[str, float]]:
    """Sum what the processes computed in an update. The device is waited for once.

    Args:
        result: This process's share of the loss, and its figures.
        batch: The sequences that it comes from.
        learned: The sequences that the objective learns from, bool [B].
        norm: Norm of the whole gradient, [].
        world: The processes.

    Returns:
        The figures' means over the sequences that are learned from; and `loss`, the masked copies that were
        computed per such sequence (`masked_copies`), and `grad_norm`.
    """
    computed = (learned.unsqueeze(-1) & batch.samples.scored.any(-1)).sum()
    figures = [(figure * learned).sum() for figure in result.figures.values()]
    sums = torch.stack([result.loss.detach(), learned.sum(), computed, *figures])
    summed = world.gather(sums.unsqueeze(0)).sum(0)
    grad_norm, loss, count, copies, *rest = torch.cat([norm.view(1), summed]).tolist()
    means = {name: value / max(count, 1) for name, value in zip(result.figures, rest, strict=True)}
    return means, {"loss": loss, "masked_copies": copies / max(count, 1), "grad_norm": grad_norm}
