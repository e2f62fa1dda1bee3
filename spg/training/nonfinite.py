"""A reward, loss or gradient that is not a finite number: which sequences it comes from, and what to keep.

`spg.reproduce` computes the record that is kept here again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from spg.algorithms.objectives import Adaptive
from spg.core.errors import RunError
from spg.core.types import Experience, UpdateBatch
from spg.core.world import World
from spg.training.update import ExactGradient

# sequences that a message names
NAMED = 5


class NonFiniteError(RunError):
    """A loss, gradient or reward is not a finite number.

    Attributes:
        record: What is needed to compute it again.
    """

    def __init__(self, text: str, record: dict[str, Any]) -> None:
        super().__init__(text)
        self.record = record


def non_finite_error(
    what: str,
    update: int,
    rollout: int,
    experience: Experience,
    batch: UpdateBatch | None,
    gradient: ExactGradient,
    weights: Mapping[str, Tensor],
    world: World,
) -> NonFiniteError:
    """Return the error that names update and sequences; every process of `world` must call this.

    Args:
        what: `reward`, `loss` or `gradient`.
        update: Number of the update, from 1.
        rollout: Number of the rollout, from 0.
        experience: What this process collected.
        batch: What the update learns from; None for a reward.
        gradient: Computes log-probabilities and loss again.
        weights: Whole trained tensors {name in the policy: [...]}; used on the first process.
        world: The processes.
    """
    completions = experience.rollout.texts
    rows = find_culprits(experience, batch, gradient)
    named = world.gather_items(
        [(dict(experience.rollout.examples[i]), completions[i], float(experience.rewards[i])) for i in rows]
    )
    part = {
        "experience": asdict(experience if batch is None else batch.experience),
        "samples": None if batch is None else asdict(batch.samples),
        "old": None if batch is None else batch.old,
    }
    record = {
        "what": what,
        "update": update,
        "rollout": rollout,
        "weights": dict(weights),
        "parts": world.gather_items([part]),
        "culprits": named,
        "objective": gradient.objective.state() if isinstance(gradient.objective, Adaptive) else {},
    }
    found = _list_sequences(named) if named else _blame_weights(gradient)
    return NonFiniteError(f"the {what} of update {update} is not a finite number; {found}", record)


def _list_sequences(named: list[tuple[dict[str, Any], str, float]]) -> str:
    listed = "\n".join(f"  {p}, completion {t!r}, reward {r}" for p, t, r in named[:NAMED])
    more = f"\n  and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return f"sequences:\n{listed}{more}"


def _blame_weights(gradient: ExactGradient) -> str:
    parameters = gradient.policy.named_parameters()
    broken = [name for name, p in parameters if not bool(p.isfinite().all())]
    return f"the weights are not finite, first {broken[0]}" if broken else "no sequence shows it alone"


def find_culprits(experience: Experience, batch: UpdateBatch | None, gradient: ExactGradient) -> list[int]:
    """Return the rows whose reward, log-probabilities or gradient are not finite, as seen in each alone."""
    bad = ~experience.rewards.isfinite()
    if batch is None or bool(bad.any()):
        return bad.nonzero().flatten().tolist()
    bad = (~gradient.all_logps(batch).isfinite() & batch.samples.scored).any(2).any(1)
    if bool(bad.any()):
        return bad.nonzero().flatten().tolist()
    return [row for row in range(len(bad)) if not _has_finite_gradient(batch, row, gradient)]


def _has_finite_gradient(batch: UpdateBatch, row: int, gradient: ExactGradient) -> bool:
    """Return whether the loss on a row's group has a finite gradient through that row alone."""
    group = batch.experience.rollout.group
    members = (group == group[row]).nonzero().flatten()  # an objective may compare them
    one = batch.select(members)
    logps = gradient.all_logps(one)
    for piece in gradient.split(one):
        own = members[piece.rows] == row
        if bool(own.any()):
            scored = [number for number, kept in zip(piece.scored, own.tolist(), strict=True) if kept]
            kept = replace(piece, rows=piece.rows[own], draws=piece.draws[own], scored=scored)
            logps = logps.index_put(kept.at, gradient.token_logps(one, kept))
    if not logps.requires_grad:
        return True
    weights = [p for p in gradient.policy.parameters() if p.requires_grad]
    loss = gradient.objective(logps, one).loss
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return all(bool(g.isfinite().all()) for g in gradients if g is not None)
