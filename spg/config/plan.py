"""What a command line asks for, composed and checked in about a second, before torch is imported.

A mistake is answered with what was given, what is allowed and the nearest right name, before a job starts.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from spg.config.checks import check, check_files, check_launcher
from spg.config.composition import (
    check_names,
    compose_open,
    is_hydra,
    key_as_written,
    open_hydra,
    parse_overrides,
)
from spg.config.errors import ConfigError
from spg.config.launchers import (
    check_hydra_names,
    check_submitit,
    fill_in_submitit,
    hydra_settings,
    uses_submitit,
)
from spg.config.options import folder_of_user


@dataclass(frozen=True)
class Plan:
    """What a command line asks for: help, one job, or a multirun.

    Attributes:
        arguments: The command line, with what follows from it for the launcher of a multirun.
        help: Whether it asks for help only.
        own: The user's folder of configuration files.
        multirun: Whether there may be several jobs.
        name: What the multirun's directory is named after.
        swept: Keys that the multirun varies.
        jobs: Their overrides for each job.
        elsewhere: Whether submitit starts the jobs, in processes that need not be on this machine.
    """

    arguments: tuple[str, ...]
    help: bool = False
    own: Path | None = None
    multirun: bool = False
    name: str = ""
    swept: tuple[str, ...] = ()
    jobs: tuple[tuple[str, ...], ...] = ()
    elsewhere: bool = False


def preflight(primary: str, argv: Sequence[str]) -> Plan:
    """Check a command line and return what it asks for.

    Args:
        primary: Name of the command's primary config.
        argv: The command line, without the program.

    Raises:
        ConfigError: for the first mistake.
    """
    args = get_args_parser().parse_args(list(argv))
    own = folder_of_user(argv)
    if args.help:
        return Plan(tuple(argv), help=True, own=own)
    if args.cfg or args.info or args.hydra_help:
        return Plan(tuple(argv), own=own)
    name = (args.config_name or primary).removesuffix(".yaml")
    with open_hydra(own):
        overrides = parse_overrides(args.overrides)
        check_hydra_names(name, overrides)
        check_names(name, overrides, own)
        sweeper = compose_open(name, [], with_hydra=True).hydra
        params = dict(sweeper.sweeper.params or {})
        multirun = args.multirun or str(sweeper.mode) == "RunMode.MULTIRUN"
        given = {key_as_written(override) for override in overrides}
        # as Hydra does: the command line takes the place of what a sweep's file says
        every = [*parse_overrides([f"{k}={v}" for k, v in params.items() if k not in given]), *overrides]
        check_names(name, every, own)
        settings = hydra_settings(name, [o for o in every if is_hydra(o)])
        elsewhere = multirun and uses_submitit(settings)
        configurations = []
        for lines in _one_at_a_time(every, multirun):
            cfg = compose_open(name, lines)
            check(cfg)
            check_files(cfg)
            if elsewhere:
                check_submitit(settings, cfg)
            elif primary == "config":  # other commands than training only read the settings
                check_launcher(cfg, multirun)
            configurations.append(cfg)
    # of several overrides of one key Hydra takes the last
    last = {key_as_written(o): o for o in every if not is_hydra(o)}
    values = {
        key: [f"{key}={value}" for value in o.sweep_string_iterator()]
        for key, o in last.items()
        if o.is_sweep_override()
    }
    title = _title(name if args.config_name else "_".join(values), overrides, bool(args.config_name))
    jobs = tuple(itertools.product(*values.values()))
    arguments = list(argv)
    if elsewhere:
        found = fill_in_submitit(settings, configurations, list(given), title)
        arguments += [f"hydra.launcher.{key}={value}" for key, value in found.items()]
    return Plan(tuple(arguments), False, own, multirun, title, tuple(values), jobs, elsewhere)


def _title(name: str, overrides: Sequence[Override], from_file: bool) -> str:
    """Return the name of a multirun: the same command gets the same one."""
    asked = sorted(o.input_line or "" for o in overrides if not is_hydra(o))
    digest = hashlib.sha256(" ".join(asked).encode()).hexdigest()[:8]
    title = name or "single"
    return re.sub(r"[^\w.-]", ".", title if from_file and not asked else f"{title}-{digest}")


def sweep_folder(primary: str, plan: Plan) -> Path:
    """Return the directory of a plan's multirun; the environment must hold the name that it is made of."""
    return Path(str(_compose_hydra(primary, plan).sweep.dir))


def check_folder_is_fixed(primary: str, plan: Plan) -> None:
    """Refuse a run whose directory is named after the time: the same command would not find it again.

    Raises:
        ConfigError: if the directory is a new one each time.
    """
    folder = OmegaConf.to_container(_compose_hydra(primary, plan).run, resolve=False)
    assert isinstance(folder, dict)
    if "${now:" in str(folder["dir"]):
        raise ConfigError(
            "resume=auto needs a directory that the same command finds again, and this one would be named "
            "after the time; add hydra.run.dir=<run dir>"
        )


def _compose_hydra(primary: str, plan: Plan) -> DictConfig:
    """Return Hydra's own settings for a plan."""
    args = get_args_parser().parse_args(list(plan.arguments))
    with open_hydra(plan.own):
        lines = [o.input_line or "" for o in parse_overrides(args.overrides) if is_hydra(o)]
        cfg = compose_open((args.config_name or primary).removesuffix(".yaml"), lines, with_hydra=True)
    settings: DictConfig = cfg.hydra
    return settings


def _one_at_a_time(overrides: Sequence[Override], multirun: bool) -> Iterator[list[str]]:
    """Yield command lines without sweeps that together hold every value that a sweep names."""
    values = []
    for override in overrides:
        if override.is_sweep_override():
            if not multirun:
                raise ConfigError(
                    f"{override.input_line} names several values; add --multirun for a run of each, or "
                    f"quote a text with commas: '{override.key_or_group}=\"...\"'"
                )
            head = (override.input_line or "").split("=", 1)[0]
            values.append([f"{head}={value}" for value in override.sweep_string_iterator()])
            if not values[-1]:
                raise ConfigError(f"{override.input_line} names no value")
        else:
            values.append([override.input_line or ""])
    first = [options[0] for options in values]
    yield first
    for i, options in enumerate(values):
        for other in options[1:]:
            yield [*first[:i], other, *first[i + 1 :]]
