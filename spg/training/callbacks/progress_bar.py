"""The progress of training on the terminal."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl

from spg.core.progress import Progress
from spg.training.module import Training

log = logging.getLogger(__name__)

# masked copies of a completion in one of SPG's updates (num_mc in its published settings)
SPG_COPIES = 2


class ProgressBar(pl.Callback):
    """A bar with update, reward, accuracy, tokens/s and time left, and log lines at the first rollout.

    If standard output is not a terminal there is no bar: the lines of validation show the progress.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Show the bar."""
        assert isinstance(module, Training)
        self._progress = Progress(
            "update",
            module.max_updates,
            completed=module.updates,
            figures="first rollout ...",
            lines=False,
            transient=False,
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar by a rollout's updates."""
        assert isinstance(module, Training)
        assert self._progress is not None
        latest = module.latest
        figures = (
            f"reward {latest['reward']:.3f}  accuracy {latest['val/accuracy']:.3f}  "
            f"{latest['throughput/tokens_per_s']:,.0f} tokens/s"
        )
        self._progress.update(module.updates, figures)
        if module.rollouts == 1:
            log.info("first rollout: %s", figures)
            _compare_with_spg(module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar, so that the error is readable."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _compare_with_spg(module: Training) -> None:
    """Log how much longer an update takes than one of SPG, if it computes more masked copies."""
    copies = module.latest["masked_copies"]
    if copies <= SPG_COPIES:
        return
    seconds = module.seconds["update"] / module.updates
    log.info(
        "an update takes %.2f s: it computes %.1f masked copies of a completion; SPG's %d would "
        "take about %.2f s (%.1f times less)",
        seconds,
        copies,
        SPG_COPIES,
        seconds * SPG_COPIES / copies,
        copies / SPG_COPIES,
    )
