"""Where metrics go: always to metrics.csv, and to Weights & Biases if it is asked for."""

from __future__ import annotations

import csv
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from spg.core.errors import RunError
from spg.core.files import put_in_place, read_csv

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """Writes a row for each update to `<folder>/metrics.csv`; a new metric adds a column.

    Metrics of the same step share a row. A row is on disk as soon as a later step is logged, `save` is called
    or the run ends.

    Args:
        folder: Directory of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}

    def cut(self, update: int) -> None:
        """Drop the rows after `update`, and the columns that only they had.

        Raises:
            RunError: if the file has no row of `update`.
        """
        kept = self.up_to(update)
        self._columns = [name for name in kept[0] if name == "update" or any(row[name] for row in kept)]
        self._write([{name: row[name] for name in self._columns} for row in kept])

    def up_to(self, update: int) -> list[dict[str, str]]:
        """Return the rows up to that of `update`; raise RunError if there is no such row."""
        try:
            rows = read_csv(self.path) if self.path.is_file() else []
        except (UnicodeDecodeError, csv.Error):
            rows = []
        last = next((i for i, row in enumerate(rows) if row.get("update") == str(update)), None)
        if last is None:
            raise RunError(
                f"{self.path} has no row of update {update}, where the checkpoint stands; it was cut or "
                "belongs to another run; put the right file back, or start a new run"
            )
        return rows[: last + 1]

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of the run: none, since every run has a folder of its own."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml lies beside the file."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of `step`."""
        if self._row and self._row["update"] != step:
            self._append()
        self._row |= {"update": step, **metrics}

    def save(self) -> None:
        """Write all rows to disk, with the pending one; later metrics start a new row."""
        self._append()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self) -> None:
        """Append the pending row; write the whole file again if the row has new columns."""
        if not self._row:
            return
        new = [name for name in self._row if name not in self._columns]
        if new:
            rows = read_csv(self.path) if self._columns else []
            self._columns += new
            self._write(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(self._row)
        self._row = {}

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        staged = self.path.with_suffix(".csv.tmp")
        with staged.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        put_in_place(staged, self.path)

    def finalize(self, status: str) -> None:
        """Write the pending row."""
        self.save()


def wandb_logger(
    project: str, entity: str | None, folder: str | Path, config: Any, group: str | None = None
) -> WandbLogger:
    """Return a W&B logger for a run: online with an account, offline without one.

    The id of the run lies in `<folder>/wandb_id`, so that a resumed run goes on in W&B too. WANDB_MODE and
    WANDB_API_KEY have the meaning that W&B gives them. The user is never asked for anything.

    Args:
        project: W&B project.
        entity: W&B team or user; None for the account's own.
        folder: Directory of the run.
        config: The settings that W&B shows.
        group: Name of the multirun that the run belongs to.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    wandb.setup()  # W&B is silent from here on
    wandb.finish()  # in a multirun, W&B would go on with the run before in this process
    offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
    if offline:
        log.info("W&B: no account found, logging offline; to send it: wandb sync %s/wandb/offline-*", folder)
    mode = {"mode": "offline"} if offline else {}
    known = Path(folder, "wandb_id")
    if not known.is_file():
        known.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    name = Path(folder).name if group is None else f"{group}/{Path(folder).name}"
    logger = WandbLogger(
        name=name,
        save_dir=str(folder),
        project=project,
        entity=entity,
        id=known.read_text(encoding="utf-8").strip(),
        group=group,
        resume="allow",  # offline, this tells `wandb sync` to append what was resumed
        **mode,
    )
    logger.experiment.config.update(config, allow_val_change=True)
    return logger
