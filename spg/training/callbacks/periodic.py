"""Callbacks that act every so many updates."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from spg.training.module import Training


class Periodic(pl.Callback):
    """Acts after the rollout in which the number of updates passes a multiple of `every`, and at the end.

    Args:
        every: Updates between two actions; 0 for never.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Count from the update at which the run starts or goes on."""
        assert isinstance(module, Training)
        self._seen = module.updates

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if it is time, or if the run ends here."""
        assert isinstance(module, Training)
        ended = module.updates >= module.max_updates
        if self.every and (module.updates // self.every > self._seen // self.every or ended):
            self.act(trainer, module)
        self._seen = module.updates

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Do what the callback is for."""
        raise NotImplementedError
