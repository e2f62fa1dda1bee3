"""Building the objects that a configuration describes."""

from __future__ import annotations

import re
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from spg.config import renames
from spg.config.errors import ConfigError

# how Hydra says where in the configuration an error comes from
_FULL_KEY = re.compile(r"full_key: (\S+)\s*$")


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a node of the configuration.

    Args:
        node: A node with a `_target_`, of this or of an older version.
        **extra: Arguments beside or in place of the node's.

    Raises:
        ConfigError: if the constructor refuses an argument with a ValueError, if an argument is missing or
            one too many, or if a part of a saved configuration lacks its class.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(renames.update_paths(node), **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise ConfigError(str(cause)) from error
        if isinstance(cause, OmegaConfBaseException) or (isinstance(cause, TypeError) and _is_call(cause)):
            where = _FULL_KEY.search(str(error))
            raise ConfigError(
                f"{'' if where is None else f'{where[1]}: '}{' '.join(str(cause).split())}; the "
                "configuration was edited, or a part of your own has another constructor"
            ) from error
        raise


def _is_call(error: TypeError) -> bool:
    """Return whether an error is about the arguments of a call that Hydra makes, and not from inside it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return name in ("inspect", "spg.core.rules") or name.startswith("hydra.")
