"""Writing checkpoints."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from spg.core.checksums import put_in_place_with_sum
from spg.core.errors import RunError
from spg.runs.directory import copy_config
from spg.runs.status import write_status
from spg.training.callbacks.periodic import Periodic
from spg.training.callbacks.validation import Validation
from spg.training.checkpoint_files import SummedFiles
from spg.training.module import Training
from spg.training.slice_folders import remove_unnamed


class Checkpoints(Periodic):
    """Writes last.ckpt every so many updates, and best.ckpt when validation improves.

    If the run is interrupted, the last checkpoint is written at once. Metrics are on disk before a checkpoint
    is; a file is written under a temporary name and then renamed, and has its checksum beside it. The slices
    that it names, if it does, are whole by then, and older ones are removed afterwards. This callback comes
    after Validation.

    Args:
        every: Updates between two writings of last.ckpt.
        folder: Where the files go.
        validation: Knows which update is the best.
        keep_every: Updates between checkpoints that are kept under their own names,
            update-<number>.ckpt; None for none.

    Attributes:
        files: Writes the files.
    """

    def __init__(
        self,
        every: int,
        folder: Path,
        validation: Validation,
        keep_every: int | None = None,
    ) -> None:
        super().__init__(every)
        self.folder = folder
        self.validation = validation
        self.keep_every = keep_every
        self._best_update = 0
        self.files = SummedFiles()
        self._saved: int | None = None
        self._noted = False  # that there is a checkpoint

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Let Lightning write checkpoints through `files`."""
        trainer.strategy.checkpoint_io = self.files

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the best checkpoint if there is a new one, and the others if it is time."""
        assert isinstance(module, Training)
        best = self.validation.best
        if best is not None and best[0] == module.updates and best[0] > self._best_update:
            self._best_update = best[0]
            self._save(trainer, "best.ckpt")
        if self.keep_every and module.updates // self.keep_every > self._seen // self.keep_every:
            self._save(trainer, f"update-{module.updates:06d}.ckpt")
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        # not `interruption.asked`: a signal may have come to this process alone since all agreed
        if trainer.should_stop:
            self.act(trainer, module)

    def act(self, trainer: pl.Trainer, module: Training) -> None:
        """Write the last checkpoint, unless the file holds this update already."""
        if self._saved != module.updates:
            self._save(trainer, "last.ckpt")
            self._saved = module.updates

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        """Write a checkpoint; raise RunError if the disk does not take it."""
        for logger in trainer.loggers:
            logger.save()
        staged = self.folder / f"{name}.tmp"
        try:
            trainer.save_checkpoint(staged)
            if trainer.is_global_zero:
                self._put_in_place(staged, self.folder / name)
                remove_unnamed(self.folder)
        except OSError as error:
            with suppress(OSError):
                staged.unlink(missing_ok=True)
                if trainer.is_global_zero:
                    remove_unnamed(self.folder)  # the slices that were begun take room
            raise RunError(
                f"{self.folder / name} could not be written ({error.strerror or error}); what was saved "
                "before is whole: make room, then resume the run"
            ) from error

    def _put_in_place(self, staged: Path, path: Path) -> None:
        """Give a checkpoint its name; after the first one note that there is one, and keep the settings."""
        put_in_place_with_sum(staged, path, self.files.take_sum(staged))
        if not self._noted:
            copy_config(self.folder.parent)
            write_status(self.folder.parent, saved=True)
            self._noted = True

    def state_dict(self) -> dict[str, Any]:
        """Return the update of the best checkpoint."""
        return {"best_update": self._best_update}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the update of the best checkpoint."""
        self._best_update = state_dict["best_update"]
