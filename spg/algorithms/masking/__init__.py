"""Masking strategies: from a rollout to M masked copies of each sequence (paper, Section 3.3)."""

from spg.algorithms.masking.base import MaskingStrategy, MonteCarloMasking
from spg.algorithms.masking.blockwise import BlockAll, BlockRandom
from spg.algorithms.masking.random import Complementary, Full, Random, Spread
from spg.algorithms.masking.trajectory import Trajectory

__all__ = [
    "BlockAll",
    "BlockRandom",
    "Complementary",
    "Full",
    "MaskingStrategy",
    "MonteCarloMasking",
    "Random",
    "Spread",
    "Trajectory",
]
