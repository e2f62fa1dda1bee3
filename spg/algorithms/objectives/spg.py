"""The Sandwiched Policy Gradient objective (paper, Eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spg.algorithms.estimators import AdaptiveOmega, Sandwich
from spg.algorithms.objectives.base import ObjectiveResult
from spg.algorithms.objectives.terms import LossNorm, divergence, normalize, require_reference
from spg.core.combinations import check_length_counted_once
from spg.core.rules import NotNegative, checked
from spg.core.types import Experience, UpdateBatch


class SPG:
    """Minus the advantage-weighted bounds: the lower one if A > 0, the upper one otherwise.

    With length weighting, as in the released code: loss = - sum_j A_j L_j n_j / sum_j n_j, where n_j counts
    the scorable positions of sequence j. Without it: the plain mean of - A_j L_j over the same sequences, for
    bounds that are sums over tokens (`elbo_weight`).

    Args:
        sandwich: The estimators of both bounds.
        loss_norm: `group`: both sums run over the sequences of one prompt, and the prompts are averaged;
            `batch`: they run over the whole update.
        length_weighting: Whether a sequence counts by its length.
        kl_coef: Coefficient of the KL divergence to the model before training, added with the same weights.
            With 0, as published, no reference is needed.

    Raises:
        ValueError: if length would be counted twice.
    """

    # a fact for the update, see `coupling`
    couples = "sequence"

    @checked
    def __init__(
        self,
        sandwich: Sandwich,
        loss_norm: LossNorm = "group",
        length_weighting: bool = True,
        kl_coef: NotNegative = 0.0,
    ) -> None:
        check_length_counted_once(sandwich.normalization, length_weighting)
        self.sandwich = sandwich
        self.loss_norm = loss_norm
        self.length_weighting = length_weighting
        self.kl_coef = kl_coef
        self.needs = frozenset({"reference"} if kl_coef > 0 else ())

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences whose advantage is not 0 and whose estimator is not constant.

        All of them, if the KL divergence is in the loss.
        """
        advantages = experience.advantages
        needed = torch.full_like(advantages, self.kl_coef > 0, dtype=torch.bool)
        if not self.sandwich.positive.constant:
            needed |= advantages > 0
        if not self.sandwich.negative.constant:
            needed |= advantages < 0
        return needed

    def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
        """Compute the loss from log-probabilities [B M T].

        Raises:
            ValueError: if kl_coef > 0 and the batch has no reference.
        """
        samples, advantages, cohort = batch.samples, batch.experience.advantages, batch.cohort
        bounds = self.sandwich(token_logps, samples)
        lower, upper = bounds.lower.sum(-1), bounds.upper.sum(-1)
        chosen = torch.where(advantages > 0, lower, upper)
        coefficients = self.coefficients(cohort.lengths, cohort.group)[cohort.own]
        loss = -(coefficients * advantages * chosen).sum()
        figures = {"bound/lower": lower, "bound/upper": upper, "bound/gap": upper - lower}
        if self.kl_coef > 0:
            reference = require_reference(batch, f"kl_coef={self.kl_coef}")
            figures["kl"] = divergence(token_logps, reference, samples)
            loss = loss + self.kl_coef * (coefficients * figures["kl"]).sum()
        # the draws that omega=auto compares are those of whole updates
        adaptive = {} if batch.is_part else self._adaptive()
        for name, omega in adaptive.items():
            sign = 1 if name.startswith("positive/") else -1
            weight = coefficients * (sign * advantages).clamp_min(0.0)
            compared = omega.figures(token_logps, samples, advantages, weight)
            figures |= {f"{name}/{key}": figure for key, figure in compared.items()}
        return ObjectiveResult(loss, figures)

    def _adaptive(self) -> dict[str, AdaptiveOmega]:
        """Return what `omega=auto` has learned, by the name of its metrics."""
        found = {"omega": self.sandwich.negative.adaptive, "positive/omega": self.sandwich.positive.adaptive}
        return {name: omega for name, omega in found.items() if omega is not None}

    def adapt(self, means: Mapping[str, float]) -> dict[str, float]:
        """Let `omega=auto` learn from the means of an update's figures; return what to log."""
        metrics = dict(means)
        for name, omega in self._adaptive().items():
            own = {key: metrics.pop(key) for key in list(metrics) if key.startswith(f"{name}/")}
            learned = omega.adapt({key.removeprefix(f"{name}/"): value for key, value in own.items()})
            metrics |= {name + key: value for key, value in learned.items()}
        return metrics

    def state(self) -> dict[str, Any]:
        """Return what `omega=auto` has learned; empty if omega is a number."""
        return {name: omega.state() for name, omega in self._adaptive().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state` back; what it does not name begins anew."""
        for name, omega in self._adaptive().items():
            omega.restore(state.get(name))

    def coefficients(self, lengths: Tensor, group: Tensor) -> Tensor:
        """Return each sequence's share [N] of the loss, from lengths [N] and group numbers [N]."""
        sizes = lengths.float() if self.length_weighting else torch.ones_like(lengths, dtype=torch.float)
        return normalize(sizes, sizes, group, self.loss_norm)
