"""The Sandwiched Policy Gradient objective (paper, Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from spg.estimators import Sandwich
from spg.limits import check_length_counted_once, check_limits
from spg.types import Cohort, Experience, MaskedSamples


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
            if reference is None:
                raise ValueError(f"kl_coef={self.kl_coef} needs the reference model's log-probabilities")
            figures["kl"] = divergence(token_logps, reference, samples)
            loss = loss + self.kl_coef * (coefficients * figures["kl"]).sum()
        return loss, {name: figure.detach() for name, figure in figures.items()}

    def coefficients(self, lengths: Tensor, group: Tensor) -> Tensor:
        """Return each sequence's share [N] of the loss, from lengths [N] and group numbers [N]."""
        shares = lengths.float() if self.length_weighting else torch.ones_like(lengths, dtype=torch.float)
        if self.loss_norm == "batch":
            return shares / shares.sum().clamp_min(1)
        _, index = torch.unique(group, return_inverse=True)
        num_groups = int(index.max()) + 1
        totals = shares.new_zeros(num_groups).index_add(0, index, shares).clamp_min(1)
        return shares / totals[index] / num_groups


def divergence(token_logps: Tensor, reference: Tensor, samples: MaskedSamples) -> Tensor:
    """Return the KL divergence to the reference, [B] nats a scored token, from log-probs [B M T].

    The k3 estimate, r - log r - 1 with r = reference / policy: never negative, 0 where they agree.
    """
    log_ratio = (reference - token_logps).masked_fill(~samples.scored, 0.0)
    excess = (log_ratio.exp() - log_ratio - 1).sum((1, 2))
    return excess / samples.scored.sum((1, 2)).clamp_min(1)
