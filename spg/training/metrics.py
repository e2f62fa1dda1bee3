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
    means = dict(zip(own, rows.mean(0).tolist(), strict=True))
    spread = rows[:, 0].view(-1, group_size).std(-1)
    tokens = world.gather(torch.tensor([timing.tokens], device=rows.device)).sum()
    if timing.steps is not None:
        means["sampling/tokens_per_step"] = float(tokens) / max(1.0, means["sampling/steps"] * len(rows))
    return {
        **means,
        "reward_std": float(spread.mean()),
        "frac_reward_zero_std": float((spread == 0).float().mean()),
        "time/rollout": timing.rollout,
        "time/reward": timing.reward,
        "throughput/tokens_per_s": float(tokens) / timing.rollout,
    }


def update_metrics(
    result: ObjectiveResult, batch: UpdateBatch, learned: Tensor, world: World
) -> tuple[float, dict[str, float], float]:
    """Sum what the processes computed in an update.

    Args:
        result: This process's share of the loss, and its figures.
        batch: The sequences that it comes from.
        learned: The sequences that the objective learns from, bool [B].
        world: The processes.

    Returns:
        The loss, the figures' means over the sequences that are learned from, and the masked copies that
        were computed per such sequence.
    """
    computed = (learned.unsqueeze(-1) & batch.samples.scored.any(-1)).sum()
    figures = [(figure * learned).sum() for figure in result.figures.values()]
    sums = torch.stack([result.loss.detach(), learned.sum(), computed, *figures])
    loss, count, copies, *rest = world.gather(sums.unsqueeze(0)).sum(0).tolist()
    means = {name: value / max(count, 1) for name, value in zip(result.figures, rest, strict=True)}
    return loss, means, copies / max(count, 1)
