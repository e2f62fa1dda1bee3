"""The Sandwiched Policy Gradient objective (paper, Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.estimators import Sandwich
from spg.limits import check_length_counted_once, check_limits
from spg.types import Bounds, Experience, MaskedSamples


class SPG:
    """Minus the advantage-weighted bounds: the lower one where A > 0, the upper one elsewhere.

    With length weighting, as released: loss = - sum_j A_j L_j n_j / sum_j n_j, where n_j counts the
    scorable positions of sequence j and both sums run over one prompt's group, the groups being
    averaged (`loss_norm=group`), or over the whole update (`batch`). Without it: the plain mean of
    - A_j L_j over the same sequences, for bounds that are sums over tokens (`elbo_weight`).
    Raises ValueError where length would be counted twice.
    """

    def __init__(self, sandwich: Sandwich, loss_norm: str = "group", length_weighting: bool = True) -> None:
        check_limits(loss_norm=loss_norm, length_weighting=length_weighting)
        check_length_counted_once(sandwich.normalization, length_weighting)
        self.sandwich = sandwich
        self.loss_norm = loss_norm
        self.length_weighting = length_weighting

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: sequences whose advantage is not 0 and whose estimator is not constant."""
        advantages = experience.advantages
        needed = torch.zeros_like(advantages, dtype=torch.bool)
        if not self.sandwich.positive.constant:
            needed |= advantages > 0
        if not self.sandwich.negative.constant:
            needed |= advantages < 0
        return needed

    def __call__(
        self, token_logps: Tensor, samples: MaskedSamples, experience: Experience
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss [], metrics) from log-probabilities [B M T] of the samples."""
        bounds = self.sandwich(token_logps, samples)
        lower, upper = bounds.lower.sum(-1), bounds.upper.sum(-1)
        chosen = torch.where(experience.advantages > 0, lower, upper)
        coefficients = self.coefficients(samples.lengths, experience.rollout.group)
        loss = -(coefficients * experience.advantages * chosen).sum()
        return loss, self._metrics(bounds, experience)

    def coefficients(self, lengths: Tensor, group: Tensor) -> Tensor:
        """Return each sequence's share [B] of the loss, from lengths [B] and group numbers [B]."""
        shares = lengths.float() if self.length_weighting else torch.ones_like(lengths, dtype=torch.float)
        if self.loss_norm == "batch":
            return shares / shares.sum().clamp_min(1)
        _, index = torch.unique(group, return_inverse=True)
        num_groups = int(index.max()) + 1
        totals = shares.new_zeros(num_groups).index_add(0, index, shares).clamp_min(1)
        return shares / totals[index] / num_groups

    def _metrics(self, bounds: Bounds, experience: Experience) -> dict[str, Tensor]:
        active = self.learns_from(experience)
        count = active.sum().clamp_min(1)
        lower = (bounds.lower.sum(-1).detach() * active).sum() / count
        upper = (bounds.upper.sum(-1).detach() * active).sum() / count
        return {"bound/lower": lower, "bound/upper": upper, "bound/gap": upper - lower}
