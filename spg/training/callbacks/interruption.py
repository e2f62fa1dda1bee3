"""Ctrl-C, SIGTERM and SIGUSR1 during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from spg.runs.signals import StopRequest
from spg.training.module import Training


class Interruption(pl.Callback):
    """Ends the run after the current rollout if a signal asks any of its processes; Checkpoints saves it.

    This callback comes first.

    Args:
        stop: Notes the signals that this process gets.

    Attributes:
        asked: Whether this process, or after a rollout any process, was asked to stop.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    @property
    def asked(self) -> bool:
        """Whether this process, or after a rollout any process, was asked to stop."""
        return self.stop.asked

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Let signals be noted, and not end the run at once, from the beginning of a `with` block on."""
        self.stop.training = True
        yield

    def keep_signals(self, trainer: pl.Trainer) -> None:
        """Let Lightning install no handlers of signals: its own write checkpoints, and wait for processes."""
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Handle the signals again, in case that another library has taken them since."""
        self.stop.take_signals()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if any process was asked to."""
        assert isinstance(module, Training)
        own = -1 if self.stop.by is None else int(self.stop.by)
        asked = module.world.gather(torch.tensor([own], device=module.device))
        first = next((number for number in asked.tolist() if number >= 0), None)
        if first is not None:
            self.stop.join(first)
            trainer.should_stop = True
