"""Sample completions in the log."""

from __future__ import annotations

import logging
import random

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger

from spg.training.callbacks.periodic import Periodic
from spg.training.module import Training

log = logging.getLogger(__name__)


class Samples(Periodic):
    """Logs a few completions of the latest rollout, and sends a table of them to W&B."""

    shown = 3

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Show the samples; which ones derives from the number of updates."""
        experience = module.experience
        assert experience is not None
        total = len(experience.rewards)
        indices = random.Random(module.updates).sample(range(total), min(self.shown, total))
        rows = [
            (
                str(module.task.prompt(experience.rollout.examples[i])),
                experience.rollout.texts[i],
                float(experience.rewards[i]),
                float(experience.advantages[i]),
            )
            for i in indices
        ]
        for _, text, reward, advantage in rows:
            shown = " / ".join(text.split("\n")).rstrip(" /")
            log.info("    sample  %s  reward %.2f  advantage %+.2f", shown, reward, advantage)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["prompt", "completion", "reward", "advantage"]
                logger.log_text("samples", columns, [list(row) for row in rows], step=module.updates)
