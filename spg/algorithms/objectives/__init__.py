"""Objectives: from token log-probabilities to a loss, one method a file."""

from spg.algorithms.objectives.base import Adaptive, Objective, ObjectiveResult, coupling
from spg.algorithms.objectives.dpo import DPO
from spg.algorithms.objectives.espo import ESPO
from spg.algorithms.objectives.grpo import GRPO
from spg.algorithms.objectives.spg import SPG
from spg.algorithms.objectives.wd1 import WD1

__all__ = ["DPO", "ESPO", "GRPO", "SPG", "WD1", "Adaptive", "Objective", "ObjectiveResult", "coupling"]
