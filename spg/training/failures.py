"""How a run that stops early says what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from spg.core import link
from spg.core.commands import command_line
from spg.core.errors import Interrupted, RunError
from spg.core.process import place, rank
from spg.training.nonfinite import NonFiniteError


@contextmanager
def explain_failures(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Add to the errors of a `with` block that trains the run in `folder` what to do about them.

    Of several processes the first one reports. The process group ends with the block, since the next run of a
    multirun makes its own.

    Args:
        cfg: Configuration of the run; goes into the file that `spg.reproduce` reads.
        folder: Directory of the run.

    Raises:
        RunError: if the run can't go on.
        Interrupted: if it was asked to stop.
    """
    again = place().command(f"resume={folder}")
    try:
        yield
    except (NonFiniteError, Interrupted) as error:
        if rank() > 0:  # a launcher ends all processes of a run if one of them ends with an error
            connection = link.current()
            if isinstance(error, NonFiniteError) and connection is not None:
                connection.over.wait(60.0)  # the first process writes what is needed to see it again
            raise SystemExit(0 if isinstance(error, Interrupted) else 1) from error
        if isinstance(error, Interrupted):
            raise Interrupted(f"{error}; go on with: {again}") from error
        raise RunError(f"{error}\nNothing was saved after it{_save(error, cfg, folder)}") from error
    except RunError as error:
        raise RunError(f"{error}\nGo on with: {again}") from error
    except RuntimeError as error:  # as torch.distributed raises if another process is gone
        connection = link.current()
        # if the first process failed, it ends this one meanwhile
        if rank() > 0 and connection is not None and connection.died.wait(10.0):
            raise SystemExit(1) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _save(error: NonFiniteError, cfg: DictConfig, folder: Path) -> str:
    """Write what is needed to reproduce a value that is not finite, and say how to do that."""
    record: dict[str, Any] = {**error.record, "config": OmegaConf.to_container(cfg, resolve=True)}
    path = folder / f"nonfinite-update-{error.record['update']:06d}.pt"
    staged = path.with_name(f"{path.name}.tmp")
    try:
        with staged.open("wb") as file:
            torch.save(record, file)
        os.replace(staged, path)
    except (OSError, RuntimeError) as failure:  # torch.save wraps the errors of a disk
        return f"; {path} could not be written ({failure})"
    return f". See it again with: {command_line('reproduce', f'file={path}')}"
