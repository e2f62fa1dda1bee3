"""Likelihood estimators: the bounds that replace log pi(x | c) (paper, Section 3)."""

from spg.algorithms.estimators.adaptive import AdaptiveOmega, optimum, variance
from spg.algorithms.estimators.base import LikelihoodEstimator
from spg.algorithms.estimators.bounds import ELBO, EUBO, Loose, Mixture, Zero
from spg.algorithms.estimators.sandwich import Sandwich

__all__ = [
    "ELBO",
    "EUBO",
    "AdaptiveOmega",
    "LikelihoodEstimator",
    "Loose",
    "Mixture",
    "Sandwich",
    "Zero",
    "optimum",
    "variance",
]
