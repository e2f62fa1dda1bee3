"""`python -m spg.reproduce file=<run dir>/nonfinite-update-....pt`: compute again what was not finite."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

from omegaconf import DictConfig

from spg.cli import launch
from spg.config import ConfigError

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Compute again what stopped a run, from the file alone, and show it sequence by sequence."""
    path = Path(cfg.file)
    check_record(path)
    from spg.core.console import take_over_logging
    from spg.training.reproduce import reproduce

    take_over_logging()
    reproduce(path)


def check_record(path: Path) -> None:
    """Refuse what can't be the file of a stopped run, before torch is imported; raises ConfigError."""
    if path.is_dir():
        found = sorted(path.glob("nonfinite-update-*.pt"))
        remedy = f"give {found[0]}" if found else "give the file that the error of the stopped run named"
        raise ConfigError(f"file={path} is a folder; {remedy}")
    if not path.is_file():
        raise ConfigError(f"file={path} is not a file; give the one that the error of the stopped run named")
    if not zipfile.is_zipfile(path):  # torch writes zip files
        raise ConfigError(
            f"file={path} is not a file that a stopped run left, or not a whole one; give the one that its "
            "error named"
        )


def main() -> None:
    """Run the command."""
    launch.run("reproduce", job)
