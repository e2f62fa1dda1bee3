"""`python -m spg.reproduce file=<run dir>/nonfinite-update-....pt`: compute again what was not finite."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from spg.cli import launch
from spg.config import ConfigError

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Compute again what stopped a run, from the file alone, and show it sequence by sequence."""
    path = Path(cfg.file)
    if not path.is_file():
        raise ConfigError(
            f"file={cfg.file} is not a file; give the one that the error of the stopped run named"
        )
    from spg.core.console import take_over_logging
    from spg.training.reproduce import reproduce

    take_over_logging()
    reproduce(path)


def main() -> None:
    """Run the command."""
    launch.run("reproduce", job)
