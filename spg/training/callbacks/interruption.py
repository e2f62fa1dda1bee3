"""Ctrl-C and SIGTERM during training."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from spg.core import link
from spg.core.errors import Interrupted
from spg.training.module import Training

log = logging.getLogger(__name__)


class Interruption(pl.Callback):
    """Ends the run after the current rollout if Ctrl-C or SIGTERM asks for it; Checkpoints saves its state.

    A second signal ends the run at once; the checkpoint before then remains. This callback comes first.

    Attributes:
        asked: Whether this process, or after a rollout any process, was asked to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle the signals for the time of a `with` block, if this thread is allowed to."""
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Handle the signals again: Lightning has installed its own handlers since."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise Interrupted("stopped at once")
        self.asked = True
        connection = link.current()
        if connection is not None:
            connection.hurry()
        log.info("Stopping when this rollout's updates are done; press Ctrl-C again to stop at once")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if any process was asked to."""
        assert isinstance(module, Training)
        self.asked = bool(module.world.gather(torch.tensor([self.asked], device=module.device).long()).any())
        if self.asked:
            trainer.should_stop = True
