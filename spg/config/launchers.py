"""Hydra's own settings on the command line: their names, and the launcher of a multirun's jobs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from spg.config.composition import compose_open, is_hydra, options_of
from spg.config.errors import ConfigError
from spg.config.names import nearest

LAUNCHER = "hydra/launcher"
# keys below which a user may add names of any kind, with a + before the key
OPEN = (
    "hydra.job.env_set",
    "hydra.job_logging",
    "hydra.hydra_logging",
    "hydra.launcher.additional_parameters",
)
# what asks SLURM for GPUs
GPUS = ("gpus_per_node", "gpus_per_task", "gres")


def check_hydra_names(primary: str, overrides: Sequence[Override]) -> None:
    """Refuse overrides of one of Hydra's groups or keys that does not exist; call it inside `open_hydra`.

    Raises:
        ConfigError: for the first such override, with the nearest name.
    """
    own = [override for override in overrides if is_hydra(override)]
    for override in (o for o in own if o.key_or_group == LAUNCHER):
        allowed, name = options_of(LAUNCHER), str(override.value())
        if name not in allowed:
            guess = nearest(name, allowed)
            raise ConfigError(
                f"{LAUNCHER}={name}: this launcher does not exist; allowed: {', '.join(allowed)}"
                + (f"; nearest: {LAUNCHER}={guess}" if guess else "")
            )
    keys = [o for o in own if "/" not in o.key_or_group]
    if not keys:
        return
    settings = hydra_settings(primary, [o for o in own if "/" in o.key_or_group])
    for override in keys:
        _check_key(override, settings)


def hydra_settings(primary: str, overrides: Sequence[Override]) -> DictConfig:
    """Return Hydra's own node, composed with these overrides; call it inside `open_hydra`."""
    lines = [override.input_line or "" for override in overrides]
    settings: DictConfig = compose_open(primary, lines, with_hydra=True).hydra
    return settings


def _check_key(override: Override, settings: DictConfig) -> None:
    key = override.key_or_group
    parent, _, name = key.rpartition(".")
    added = (override.input_line or "").startswith("+")
    if any(key.startswith(f"{node}.") for node in OPEN) and added:
        return
    node = (
        OmegaConf.select(settings, parent.removeprefix("hydra").lstrip("."))
        if parent != "hydra"
        else settings
    )
    known = [] if not isinstance(node, DictConfig) else [str(child) for child in node if child != "_target_"]
    if name in known or key == "hydra":
        return
    guess = nearest(name, known)
    raise ConfigError(
        f"{override.input_line}: there is no key {key!r}"
        + (f"; allowed here: {', '.join(f'{parent}.{child}' for child in known)}" if known else "")
        + (f"; nearest: {parent}.{guess}" if guess else "")
    )


def uses_submitit(settings: DictConfig) -> bool:
    """Return whether submitit starts the jobs of a multirun, maybe on other machines."""
    return "submitit" in str(settings.launcher.get("_target_"))


def check_submitit(settings: DictConfig, cfg: DictConfig) -> None:
    """Refuse what jobs that submitit starts can't do.

    Args:
        settings: Hydra's node.
        cfg: The configuration of a job.

    Raises:
        ConfigError: if a job would need several nodes or tasks, or requeue itself, or if there is no SLURM.
    """
    launcher = settings.launcher
    for key in ("nodes", "tasks_per_node"):
        if launcher.get(key) != 1:
            raise ConfigError(
                f"hydra.launcher.{key}={launcher.get(key)}: each job of a multirun is one task, which "
                f"starts its trainer.devices processes itself; leave hydra.launcher.{key} out"
            )
    nodes = OmegaConf.select(cfg, "trainer.nodes", default=1)
    if nodes != 1:
        raise ConfigError(
            f"trainer.nodes={nodes}: the jobs of a multirun have one node each; give trainer.nodes=1, or "
            "start each run with srun in a job of its own"
        )
    if OmegaConf.select(cfg, "trainer.requeue"):
        raise ConfigError(
            "trainer.requeue=true: submitit itself requeues the jobs of a multirun when their time is over; "
            "leave it out"
        )
    if _is_slurm(settings) and (
        missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    ):
        raise ConfigError(
            f"{LAUNCHER}=submitit_slurm: this machine does not have {' and '.join(missing)}; start the "
            f"multirun on a machine from which jobs are submitted, or give {LAUNCHER}=joblib"
        )


def fill_in_submitit(
    settings: DictConfig, jobs: Sequence[DictConfig], given: Sequence[str], name: str
) -> dict[str, Any]:
    """Return the launcher's settings that follow from the jobs, if the command line leaves them open.

    A job asks for the GPUs and cores that its processes use, and goes on after its time limit.

    Args:
        settings: Hydra's node.
        jobs: Configurations that have every value of the multirun.
        given: Keys that the command line sets.
        name: Name of the multirun.

    Returns:
        Values by their keys in the launcher.
    """
    trainers: list[Mapping[str, Any]] = [cfg.trainer for cfg in jobs if "trainer" in cfg]
    processes = max((trainer["devices"] for trainer in trainers), default=1)
    machines = [cfg.get("trainer") or cfg for cfg in jobs]
    threads = max(int(machine.get("threads", 1)) for machine in machines)
    found: dict[str, Any] = {"name": name}
    if _is_slurm(settings):
        found |= {"cpus_per_task": processes * threads, "signal_delay_s": 300, "max_num_timeout": 100}
    else:
        found["timeout_min"] = 7 * 24 * 60  # no one else waits for this machine
    on_cpu = all(machine.get("accelerator") == "cpu" for machine in machines)
    if not on_cpu and not any(f"hydra.launcher.{key}" in given for key in GPUS):
        found["gpus_per_node"] = processes
    return {key: value for key, value in found.items() if f"hydra.launcher.{key}" not in given}


def _is_slurm(settings: DictConfig) -> bool:
    return str(settings.launcher.get("_target_")).endswith(".SlurmLauncher")
