"""The configuration: composed, checked and built.

`preflight` composes and checks a command line in about a second, before torch is imported. `compose` does the
same for a list of overrides, and `build` makes the objects that a configuration describes.
"""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from spg.config.checks import check, check_launcher, check_model, check_samples
from spg.config.composition import compose_unchecked, defaults
from spg.config.errors import ConfigError
from spg.config.help import show_help
from spg.config.instances import build
from spg.config.knobs import decoding_notes, notes, unread_knobs, unread_steps
from spg.config.names import is_known, keys, nearest
from spg.config.options import CONF_DIR, group_choices, groups
from spg.config.paths import quote, quote_paths, unquote
from spg.config.plan import Plan, check_folder_is_fixed, preflight, sweep_folder
from spg.config.renames import current_path, update_paths
from spg.config.saved import check_complete, load_saved, make_paths_absolute, shipped_option, task_of_run
from spg.config.values import rules

__all__ = [
    "CONF_DIR",
    "ConfigError",
    "Plan",
    "build",
    "check",
    "check_complete",
    "check_folder_is_fixed",
    "check_launcher",
    "check_model",
    "check_samples",
    "compose",
    "current_path",
    "decoding_notes",
    "defaults",
    "group_choices",
    "groups",
    "is_known",
    "keys",
    "load_saved",
    "make_paths_absolute",
    "nearest",
    "notes",
    "preflight",
    "quote",
    "quote_paths",
    "rules",
    "shipped_option",
    "show_help",
    "sweep_folder",
    "task_of_run",
    "unquote",
    "unread_knobs",
    "unread_steps",
    "update_paths",
]


def compose(primary: str, overrides: Sequence[str]) -> DictConfig:
    """Compose and check a configuration.

    Args:
        primary: Name of a primary config: `config` for training, `evaluate`, ...
        overrides: As on the command line: `group=option` and `key=value`.

    Raises:
        ConfigError: for the first mistake.
    """
    cfg = compose_unchecked(primary, overrides)
    check(cfg)
    return cfg
