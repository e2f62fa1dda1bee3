"""Composing a configuration with Hydra, after the names on the command line are checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spg.config.errors import ConfigError
from spg.config.names import is_known, keys, nearest
from spg.config.options import CONF_DIR, OPTIONAL, group_choices, groups
from spg.config.paths import quote

# paths of files and the times of their last change
Stamp = tuple[tuple[str, int], ...]

OmegaConf.register_new_resolver("ceil_div", lambda a, b: -(-int(a) // int(b)), replace=True)


@contextmanager
def open_hydra(own: Path | None = None) -> Iterator[None]:
    """Let Hydra find the shipped configuration files and those of the user's folder `own` (-cd).

    Raises:
        ConfigError: if `own` is not a folder.
    """
    search = create_config_search_path(str(CONF_DIR))
    if own is not None:
        if not own.is_dir():
            raise ConfigError(
                f"--config-dir {own} is not a directory; give the folder of your own YAML files"
            )
        search.prepend("command-line", f"file://{own}", "schema")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name="spg", config_search_path=search)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def defaults(primary: str, own: Path | None = None) -> DictConfig:
    """Return a primary config as it is without a command line, unchecked."""
    with open_hydra(own):
        return compose_open(primary, [])


def compose_unchecked(primary: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a primary config with overrides, of which only the names are checked; raises ConfigError."""
    with open_hydra():
        lines = group_choices(overrides)
        check_names(primary, parse_overrides(lines))
        return compose_open(primary, lines)


def compose_open(primary: str, lines: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """Compose inside `open_hydra`; raises ConfigError."""
    try:
        return _compose(_stamp(), primary, tuple(lines), with_hydra).copy()
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        cause = error.__cause__  # says why a value can't be merged
        text = str(error) if cause is None else f"{error}: {str(cause).partition(chr(10))[0]}"
        raise ConfigError(" ".join(text.split())) from error


@lru_cache(maxsize=64)
def _compose(stamp: Stamp, primary: str, lines: tuple[str, ...], with_hydra: bool) -> DictConfig:
    return hydra.compose(primary, list(lines), return_hydra_config=with_hydra)


def _stamp() -> Stamp:
    """Return what tells whether any file that Hydra could read has changed."""
    search = GlobalHydra.instance().config_loader().get_search_path()
    folders = [Path(part.path.removeprefix("file://")) for part in search.get_path() if part.path]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.rglob("*.yaml"))
    return tuple((str(file), file.stat().st_mtime_ns) for file in files)


def parse_overrides(lines: Sequence[str]) -> list[Override]:
    """Parse overrides inside `open_hydra`; raises ConfigError."""
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    found = []
    for line in lines:
        try:
            found.append(parser.parse_override(line))
        except HydraException as error:
            key, equals, value = line.partition("=")
            remedy = f'; if the value is one text, quote it: "{key}={quote(value)}"' if equals else ""
            raise ConfigError(f"{line} can't be read: {str(error).splitlines()[0]}{remedy}") from error
    return found


def is_hydra(override: Override) -> bool:
    """Return whether an override is one of Hydra's own settings."""
    return override.key_or_group == "hydra" or override.key_or_group.startswith(("hydra.", "hydra/"))


def key_as_written(override: Override) -> str:
    """Return the key as the command line has it: `estimator@positive` is not the same as `estimator`."""
    return override.get_key_element().lstrip("+~")


def check_names(primary: str, overrides: Sequence[Override], own: Path | None = None) -> None:
    """Refuse overrides of a group, an option or a key that does not exist.

    Args:
        primary: Name of the primary config.
        overrides: What the command line sets.
        own: The user's folder of configuration files.

    Raises:
        ConfigError: for the first such override, with the nearest name.
    """
    for override in overrides:
        _check_option(override)
    # if an override names several options, the first one decides which keys there are
    chosen = [
        f"{(o.input_line or '').split('=', 1)[0]}={next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else o.input_line or ""
        for o in overrides
        if _is_group(o)
    ]
    known = compose_open(primary, chosen)
    for override in overrides:
        _check_key(override, known, own)


def options_of(group: str) -> list[str]:
    """Return the names of the options of a group, inside `open_hydra`."""
    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def _is_group(override: Override) -> bool:
    return bool(options_of(override.key_or_group)) and not override.is_delete()


def _check_option(override: Override) -> None:
    group = override.key_or_group
    if not _is_group(override) or group.startswith("hydra"):
        return
    options = options_of(group)
    chosen = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    for value in chosen:
        name = "null" if value is None else str(value)
        if name not in options:
            key = key_as_written(override)
            guess = nearest(name, options)
            raise ConfigError(
                f"{key}={name}: {group} has no option {name!r}; allowed: {', '.join(options)}"
                + (f"; {key}=null can be chosen in a run of its own" if group in OPTIONAL else "")
                + (f"; nearest: {key}={guess}" if guess else "")
            )


def _check_key(override: Override, known: DictConfig, own: Path | None) -> None:
    key = override.key_or_group
    if is_hydra(override):
        return
    if override.is_delete() and key in OPTIONAL:
        return
    if override.is_delete():
        raise ConfigError(f"{override.input_line}: {key!r} can't be removed; set it to another value")
    if is_known(known, key) or options_of(key):
        return
    # a task's table of styles can be set, but is seldom what was meant
    allowed = [*(name for name in keys(known) if not name.startswith("styles.")), *groups(own)]
    guess = nearest(key, allowed)
    siblings = [name for name in allowed if name.rpartition(".")[0] == key.rpartition(".")[0]]
    raise ConfigError(
        f"{override.input_line}: there is no key {key!r}; allowed here: "
        f"{', '.join(siblings or groups(own))}" + (f"; nearest: {guess}" if guess else "")
    )
