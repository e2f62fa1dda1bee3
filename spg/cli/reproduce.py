"""`python -m spg.reproduce file=<run dir>/nonfinite-update-....pt`: see a number that is none again."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from spg import config
from spg.cli import launch

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Compute again, from the file alone, what stopped a run, and show it sequence by sequence."""
    path = Path(cfg.file)
    if not path.is_file():
        raise config.ConfigError(f"file={cfg.file} is no file; give the one that the stopped run named")
    from spg.core.console import take_over_logging
    from spg.training.reproduce import reproduce

    take_over_logging()
    reproduce(path)


def main() -> None:
    """Run the command."""
    launch.run("reproduce", job)
