"""What happens around the updates: validation, checkpoints, samples, progress."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spg.collect import Evaluation
from spg.console import console
from spg.module import Training
from spg.weights import load_checkpoint

log = logging.getLogger(__name__)


class _Every(pl.Callback):
    """Acts after the rollout in which the number of updates passes a multiple of `every`."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._seen = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act, if it is time or the run's end."""
        assert isinstance(module, Training)
        ended = module.updates >= module.max_updates
        if self.every and (module.updates // self.every > self._seen // self.every or ended):
            self.act(trainer, module)
        self._seen = module.updates

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Do what the callback is for."""
        raise NotImplementedError


class Validation(_Every):
    """Evaluates the validation half before the first update, every so many updates and at the end.

    `history` holds (update, accuracy); `best` the highest after training began.
    """

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.history: list[tuple[int, float]] = []

    @property
    def best(self) -> tuple[int, float]:
        """Update and accuracy of the best validation after the first update, the earliest if several."""
        return max(self.history[1:], key=lambda entry: entry[1])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the base model."""
        assert isinstance(module, Training)
        self.act(trainer, module)

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Evaluate, log, and say so in a line."""
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


MOMENTS = ("before", "after", "last")


class BeforeAndAfter(pl.Callback):
    """Evaluates the test half before the first update, after the last, and at the best checkpoint."""

    def __init__(self) -> None:
        self.results: dict[str, Evaluation] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the base model."""
        assert isinstance(module, Training)
        self.results["before"] = module.evaluate("test")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the model as the last update left it."""
        assert isinstance(module, Training)
        self.results["last"] = module.evaluate("test")

    def summary(self, module: Training, best: Path) -> dict[str, Any]:
        """Return n and every measure at the three MOMENTS with its 95% interval.

        `after` is the checkpoint `best`, chosen on the validation half; the module is left with its
        weights.
        """
        load_checkpoint(module.policy.network, best)
        self.results["after"] = module.evaluate("test")
        figures: dict[str, Any] = {"n": len(self.results["after"].texts)}
        for name in self.results["after"].measures:
            for moment in MOMENTS:
                figures[f"{name}.{moment}"] = self.results[moment].mean(name)
                figures[f"{name}.{moment}.interval"] = list(self.results[moment].interval(name))
        return figures


class Checkpoints(_Every):
    """Writes checkpoints/last.ckpt every so many updates, and best.ckpt when validation improves.

    Files are written under a temporary name and renamed. Comes after Validation among the callbacks.
    """

    def __init__(self, every: int, folder: Path, validation: Validation) -> None:
        super().__init__(every)
        self.folder = folder
        self.validation = validation
        self._best_update = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the best if there is a new one, and the last if it is time."""
        if len(self.validation.history) > 1 and self.validation.best[0] > self._best_update:
            self._best_update = self.validation.best[0]
            self._save(trainer, "best.ckpt")
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Save the last checkpoint."""
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        staged = self.folder / f"{name}.tmp"
        trainer.save_checkpoint(staged)
        os.replace(staged, self.folder / name)


class Samples(_Every):
    """Prints a few completions of the latest rollout, and gives W&B a table of them."""

    shown = 3

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Show the samples; the choice derives from the number of updates."""
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


class ProgressBar(pl.Callback):
    """A bar with update, reward, accuracy, tokens/s and time left; one line at the first rollout.

    Where standard output is no terminal there is no bar: the lines of validation tell the progress.
    """

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("update"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the bar."""
        assert isinstance(module, Training)
        self.progress.start()
        self.bar = self.progress.add_task("", total=module.max_updates, figures="first rollout ...")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar on by a rollout's updates."""
        assert isinstance(module, Training)
        latest = module.latest
        figures = (
            f"reward {latest['reward']:.3f}  accuracy {latest['val/accuracy']:.3f}  "
            f"{latest['throughput/tokens_per_s']:,.0f} tokens/s"
        )
        self.progress.update(self.bar, completed=module.updates, figures=figures)
        if batch_idx == 0:
            log.info("first rollout: %s", figures)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the bar away."""
        self.progress.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the error is readable."""
        self.progress.stop()
