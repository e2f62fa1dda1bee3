"""What every likelihood estimator has.

An estimator maps token log-probabilities [B M T] and the samples they belong to onto parts [B T] whose sum
over T is the sequence's estimate, in nats. There are two scales, `normalization`:

- `per_token`, as in the released code: the ELBO divided by the region's length n_j, the EUBO averaged over
  the tokens that at least one draw scored;
- `elbo_weight`: the sums themselves, with the weight w(t) = 1/t of the samples.

The mean over the M draws uses `samples.weight`. Draws of unequal probability (exact enumeration) are averaged
correctly if M * probability is folded into the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from spg.algorithms.estimators.adaptive import AdaptiveOmega
from spg.core.rules import checked
from spg.core.types import MaskedSamples

Normalization = Literal["per_token", "elbo_weight"]


class LikelihoodEstimator(ABC):
    """Estimates a sequence's log-likelihood from M masked copies of it.

    Args:
        normalization: The scale of the estimate, see the module's docstring.

    Attributes:
        constant: Whether the estimate needs no log-probabilities, so that the sequences need no forward pass.
        adaptive: What `omega=auto` has learned so far; None if the estimator has nothing to learn.
    """

    constant = False
    adaptive: AdaptiveOmega | None = None

    @checked
    def __init__(self, normalization: Normalization = "per_token") -> None:
        self.normalization = normalization

    @abstractmethod
    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        """Estimate the log-likelihood of each sequence.

        Args:
            token_logps: Log-probabilities [B M T] in nats, with any value at positions that are not scored.
            samples: The masked copies that they belong to.

        Returns:
            Parts [B T] in nats.
        """

    def _mean_over_scored(self, parts: Tensor, samples: MaskedSamples) -> Tensor:
        """Turn parts [B T] of tokens that some draw scored into parts of their mean, if per token."""
        if self.normalization == "elbo_weight":
            return parts
        return parts / samples.scored.any(1).sum(-1, keepdim=True).clamp_min(1)
