"""The paths of parts that have moved: runs and checkpoints of earlier versions name the old ones."""

from __future__ import annotations

from typing import Any

# modules of version 0.5, each with the package that holds its parts today
_MODULES = {
    "spg.advantages": "spg.algorithms.advantages",
    "spg.decoding": "spg.rollout.decoder",
    "spg.estimators": "spg.algorithms.estimators",
    "spg.masking": "spg.algorithms.masking",
    "spg.objectives": "spg.algorithms.objectives",
    "spg.preferences": "spg.rollout.preferences",
}


def rename(value: Any) -> Any:
    """Return today's path of a part that an earlier version named; any other value unchanged."""
    if not isinstance(value, str):
        return value
    for old, new in _MODULES.items():
        if value.startswith(f"{old}."):
            return new + value.removeprefix(old)
    return value
