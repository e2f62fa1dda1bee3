"""Evaluation of the validation half while a run trains."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch

from spg.training.callbacks.periodic import Periodic
from spg.training.module import Training

log = logging.getLogger(__name__)


class Validation(Periodic):
    """Evaluates the validation half before the first update, every so many updates, and at the end.

    Attributes:
        history: The validations so far, each as (update, accuracy).
        since: First update whose checkpoint may be the best one. A run that goes back to an earlier
            checkpoint may have lost the best one before it.
    """

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.history: list[tuple[int, float]] = []
        self.since = 1

    @property
    def best(self) -> tuple[int, float] | None:
        """Update and accuracy of the best validation, the earliest of equals; None before the first."""
        entries = [entry for entry in self.history if entry[0] >= self.since]
        return max(entries, key=lambda entry: entry[1], default=None)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the base model, unless the run goes on from a checkpoint."""
        super().on_train_start(trainer, module)
        assert isinstance(module, Training)
        self.since = int(module.world.gather(torch.tensor([self.since], device=module.device))[0])
        if not self.history:
            self.act(trainer, module)

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Evaluate, record the measures, and log them in one line."""
        result = module.evaluate("validation")
        measures = {name: result.mean(name) for name in result.measures}
        module.record({f"val/{name}": value for name, value in measures.items()}, module.updates)
        self.history.append((module.updates, measures["accuracy"]))
        reward = module.latest.get("reward")
        log.info(
            "update %4d  reward %s  validation: %s",
            module.updates,
            "    -" if reward is None else f"{reward:.3f}",
            "  ".join(f"{name} {value:.3f}" for name, value in measures.items()),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the history and `since`."""
        return {"history": list(self.history), "since": self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history and `since`."""
        self.history = [(update, accuracy) for update, accuracy in state_dict["history"]]
        self.since = max(self.since, state_dict["since"])
