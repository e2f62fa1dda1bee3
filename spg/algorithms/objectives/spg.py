"""The Sandwiched Policy Gradient objective (paper, Eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spg.algorithms.estimators import AdaptiveOmega, Sandwich
from spg.algorithms.objectives.terms import divergence, required, shares
from spg.core.combinations import check_length_counted_once
from spg.core.limits import check_limits
from spg.core.types import Cohort, Experience, MaskedSamples


class SPG:
    """Minus the advantage-weighted bounds: the lower one where A > 0, the upper one elsewhere.

    With length weighting, as released: loss = - sum_j A_j L_j n_j / sum_j n_j, where n_j counts the
    scorable positions of sequence j and both sums run over one prompt's group, the groups being
    averaged (`loss_norm=group`), or over the whole update (`batch`). Without it: the plain mean of
    - A_j L_j over the same sequences, for bounds that are sums over tokens (`elbo_weight`).
    kl_coef: of the KL divergence to the reference model, added with the same weights; 0, as published,
    needs no reference. Raises ValueError where length would be counted twice.
    """

    def __init__(
        self,
        sandwich: Sandwich,
        loss_norm: str = "group",
        length_weighting: bool = True,
        kl_coef: float = 0.0,
    ) -> None:
        check_limits(loss_norm=loss_norm, length_weighting=length_weighting, kl_coef=kl_coef)
        check_length_counted_once(sandwich.normalization, length_weighting)
        self.sandwich = sandwich
        self.loss_norm = loss_norm
        self.length_weighting = length_weighting
        self.kl_coef = kl_coef
        self.needs = frozenset({"reference"} if kl_coef > 0 else ())

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences whose advantage is not 0 and whose estimator is not constant.

        All, where the KL divergence is in the loss.
        """
        advantages = experience.advantages
        needed = torch.full_like(advantages, self.kl_coef > 0, dtype=torch.bool)
        if not self.sandwich.positive.constant:
            needed |= advantages > 0
        if not self.sandwich.negative.constant:
            needed |= advantages < 0
        return needed

    def __call__(
        self,
        token_logps: Tensor,
        samples: MaskedSamples,
        experience: Experience,
        cohort: Cohort | None = None,
        reference: Tensor | None = None,
        old: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (this process's share of the loss [], figures {name: [B]}) of samples' [B M T].

        reference [B M T]: needed with kl_coef > 0; ValueError where it is missing then.
        """
        if cohort is None:
            cohort = Cohort.of(experience, samples)
        bounds = self.sandwich(token_logps, samples)
        lower, upper = bounds.lower.sum(-1), bounds.upper.sum(-1)
        chosen = torch.where(experience.advantages > 0, lower, upper)
        coefficients = self.coefficients(cohort.lengths, cohort.group)[cohort.own]
        loss = -(coefficients * experience.advantages * chosen).sum()
        figures = {"bound/lower": lower, "bound/upper": upper, "bound/gap": upper - lower}
        if self.kl_coef > 0:
            reference = required(reference, "reference", f"kl_coef={self.kl_coef}")
            figures["kl"] = divergence(token_logps, reference, samples)
            loss = loss + self.kl_coef * (coefficients * figures["kl"]).sum()
        for name, omega in self._adaptive().items():
            sign = 1 if name.startswith("positive/") else -1
            weight = coefficients * (sign * experience.advantages).clamp_min(0.0)
            told = omega.figures(token_logps, samples, experience.advantages, weight)
            figures |= {f"{name}/{key}": figure for key, figure in told.items()}
        return loss, {name: figure.detach() for name, figure in figures.items()}

    def _adaptive(self) -> dict[str, AdaptiveOmega]:
        """Return what `omega=auto` has learned, by the name of its metrics."""
        found = {"omega": self.sandwich.negative.adaptive, "positive/omega": self.sandwich.positive.adaptive}
        return {name: omega for name, omega in found.items() if omega is not None}

    def adapt(self, means: Mapping[str, float]) -> dict[str, float]:
        """Let `omega=auto` learn from the means of an update's figures; return what to log."""
        metrics = dict(means)
        for name, omega in self._adaptive().items():
            told = {key: metrics.pop(key) for key in list(metrics) if key.startswith(f"{name}/")}
            learned = omega.adapt({key.removeprefix(f"{name}/"): value for key, value in told.items()})
            metrics |= {name + key: value for key, value in learned.items()}
        return metrics

    def state(self) -> dict[str, Any]:
        """Return what `omega=auto` has learned; empty where omega is a number."""
        return {name: omega.state() for name, omega in self._adaptive().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state` back; what it does not name begins anew."""
        for name, omega in self._adaptive().items():
            omega.restore(state.get(name))

    def coefficients(self, lengths: Tensor, group: Tensor) -> Tensor:
        """Return each sequence's share [N] of the loss, from lengths [N] and group numbers [N]."""
        sizes = lengths.float() if self.length_weighting else torch.ones_like(lengths, dtype=torch.float)
        return shares(sizes, sizes, group, self.loss_norm)
