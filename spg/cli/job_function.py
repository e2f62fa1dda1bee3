"""The job of a command as Hydra calls it, in this process or in another one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from spg.core.errors import InputError, RunError

# what a process of another launcher must not take over
OWN = ("SPG_RANK", "SPG_PARENT")


class JobFunction:
    """Does a job, and keeps its error: Hydra would print a line of its own before it.

    joblib and submitit pickle it for their processes, which get this process's SPG_* variables with it: they
    say what the multirun is called and which keys it sweeps, and a cluster may not pass on the environment.

    Args:
        job: Does the work of a configuration.

    Attributes:
        failures: Errors of jobs in this process.
    """

    def __init__(self, job: Callable[[DictConfig], Any]) -> None:
        self.job = job
        self.failures: list[Exception] = []

    def __call__(self, cfg: DictConfig) -> None:
        """Do the job."""
        try:
            self.job(cfg)
        except (InputError, RunError, OSError) as error:
            self.failures.append(error)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs."""
        variables = {n: v for n, v in os.environ.items() if n.startswith("SPG_") and n not in OWN}
        return {"job": self.job, "environment": variables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the job and the environment, before Hydra looks for the job's directory."""
        os.environ.update(state["environment"])
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        self.__init__(state["job"])  # type: ignore[misc]
