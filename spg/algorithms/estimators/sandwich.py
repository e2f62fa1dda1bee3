"""The sandwich: one estimator for positive traces, another for the others."""

from __future__ import annotations

from torch import Tensor

from spg.algorithms.estimators.base import LikelihoodEstimator
from spg.core.types import Bounds, MaskedSamples


class Sandwich:
    """Pairs the estimator of positive traces (A > 0) with that of the others (Eq. 5).

    Raises:
        ValueError: if the two are on different scales.
    """

    def __init__(self, positive: LikelihoodEstimator, negative: LikelihoodEstimator) -> None:
        if positive.normalization != negative.normalization:
            raise ValueError(
                f"positive traces use normalization={positive.normalization}, negative ones "
                f"{negative.normalization}; give both the same"
            )
        self.positive = positive
        self.negative = negative
        self.normalization = positive.normalization

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Bounds:
        """Return the parts [B T] of both estimates from log-probabilities [B M T]."""
        return Bounds(self.positive(token_logps, samples), self.negative(token_logps, samples))
