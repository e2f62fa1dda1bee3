"""What happens around the updates: validation, checkpoints, samples, progress."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spg.core.console import console
from spg.core.errors import Interrupted, RunError
from spg.models.weights import read_checkpoint
from spg.rollout.collect import Evaluation
from spg.training.module import Training

log = logging.getLogger(__name__)

# masked copies of a completion in one of SPG's updates (num_mc in its published settings)
SPG_COPIES = 2


class Interruption(pl.Callback):
    """Notes Ctrl-C and SIGTERM: the run ends after the current rollout, with its state saved by Checkpoints.

    A second signal ends it at once; the checkpoint before then stands. Comes first among the callbacks.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over for the time of a `with` block, where this thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the signals over again."""
        for number in self._before:  # Lightning has put its own there since
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise Interrupted("stopped at once")
        self.asked = True
        log.info("Stopping when this rollout's updates are done; press Ctrl-C again to stop at once")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if any process was asked to."""
        assert isinstance(module, Training)
        self.asked = bool(module.world.gather(torch.tensor([self.asked], device=module.device).long()).any())
        if self.asked:
            trainer.should_stop = True


class _Every(pl.Callback):
    """Acts after the rollout in which the number of updates passes a multiple of `every`."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Count from where the run starts or goes on."""
        assert isinstance(module, Training)
        self._seen = module.updates

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

    `history` holds (update, accuracy); `best` the highest after training began. since: the update from
    which on checkpoints of what was validated exist.
    """

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.history: list[tuple[int, float]] = []
        self.since = 1

    @property
    def best(self) -> tuple[int, float] | None:
        """Update and accuracy of the best validation, the earliest if several; None before the first."""
        entries = [entry for entry in self.history if entry[0] >= self.since]
        return max(entries, key=lambda entry: entry[1], default=None)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the base model, unless the run goes on."""
        super().on_train_start(trainer, module)
        assert isinstance(module, Training)
        self.since = int(module.world.gather(torch.tensor([self.since], device=module.device))[0])
        if not self.history:
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

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": list(self.history), "since": self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history back."""
        self.history = [(update, accuracy) for update, accuracy in state_dict["history"]]
        self.since = max(self.since, state_dict["since"])


MOMENTS = ("before", "after", "last")


class BeforeAndAfter(pl.Callback):
    """Evaluates the test half before the first update, after the last, and at the best checkpoint."""

    def __init__(self, best: Path, validation: Validation) -> None:
        self.best = best
        self.validation = validation
        self.results: dict[str, Evaluation] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the base model, unless the run goes on."""
        assert isinstance(module, Training)
        if "before" not in self.results:
            self.results["before"] = module.evaluate("test")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the model as the last update left it and the best checkpoint, if all updates are done."""
        assert isinstance(module, Training)
        if module.updates < module.max_updates:
            return
        self.results["last"] = module.evaluate("test")
        last, best = module.weights.copies(), read_checkpoint(self.best)
        update, chosen = best["spg"]["updates"], self.validation.best
        if chosen is None or chosen[0] != update:
            raise RunError(
                f"{self.best} is of update {update}, but validation chose {chosen}; resume an older one"
            )
        module.weights.load(best["state_dict"])
        del best
        self.results["after"] = module.evaluate("test")
        module.weights.load(last)

    def summary(self) -> dict[str, Any]:
        """Return n and every measure at the three MOMENTS with its 95% interval.

        `after` is the best checkpoint, chosen on the validation half.
        """
        figures: dict[str, Any] = {"n": len(self.results["after"].texts)}
        for name in self.results["after"].measures:
            for moment in MOMENTS:
                figures[f"{name}.{moment}"] = self.results[moment].mean(name)
                figures[f"{name}.{moment}.interval"] = list(self.results[moment].interval(name))
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return the measures and texts of the base model."""
        if "before" not in self.results:
            return {}
        before = self.results["before"]
        measures = {name: torch.from_numpy(values) for name, values in before.measures.items()}
        return {"measures": measures, "texts": list(before.texts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the base model's measures and texts back."""
        measures = {name: values.numpy() for name, values in state_dict["measures"].items()}
        self.results["before"] = Evaluation(measures, tuple(state_dict["texts"]), ())


class Checkpoints(_Every):
    """Writes checkpoints/last.ckpt every so many updates, and best.ckpt when validation improves.

    keep_every: updates between checkpoints that are kept besides, as update-<number>.ckpt; None for
    none. Where the run is interrupted, the last is saved at once. Files are written under a temporary name
    and renamed, metrics being on disk before. Comes after Validation among the callbacks. Raises RunError
    where the disk does not take a file.
    """

    def __init__(
        self,
        every: int,
        folder: Path,
        validation: Validation,
        interruption: Interruption,
        keep_every: int | None = None,
    ) -> None:
        super().__init__(every)
        self.folder = folder
        self.validation = validation
        self.interruption = interruption
        self.keep_every = keep_every
        self._best_update = 0
        self._saved: int | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the best if there is a new one, and the last if it is time."""
        assert isinstance(module, Training)
        best = self.validation.best
        if best is not None and best[0] == module.updates and best[0] > self._best_update:
            self._best_update = best[0]
            self._save(trainer, "best.ckpt")
        if self.keep_every and module.updates // self.keep_every > self._seen // self.keep_every:
            self._save(trainer, f"update-{module.updates:06d}.ckpt")
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if self.interruption.asked:
            self.act(trainer, module)

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Save the last checkpoint, unless it is there already."""
        if self._saved != module.updates:
            self._save(trainer, "last.ckpt")
            self._saved = module.updates

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        for logger in trainer.loggers:
            logger.save()
        staged = self.folder / f"{name}.tmp"
        try:
            trainer.save_checkpoint(staged)
            if trainer.is_global_zero:
                with staged.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(staged, self.folder / name)
        except OSError as error:
            with suppress(OSError):
                staged.unlink(missing_ok=True)
            raise RunError(
                f"{self.folder / name} could not be written ({error.strerror or error}); what was saved "
                "before is whole: make room, then resume the run"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Return the update of the best checkpoint."""
        return {"best_update": self._best_update}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the update of the best checkpoint back."""
        self._best_update = state_dict["best_update"]


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
        total, done = module.max_updates, module.updates
        self.bar = self.progress.add_task("", total=total, completed=done, figures="first rollout ...")

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
        if module.rollouts == 1:
            log.info("first rollout: %s", figures)
            copies = latest["masked_copies"]
            if copies > SPG_COPIES:
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

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the bar away."""
        self.progress.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the error is readable."""
        self.progress.stop()
