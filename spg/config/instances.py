"""Building the objects that a configuration describes."""

from __future__ import annotations

from typing import Any

from spg.config import renames
from spg.config.errors import ConfigError


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a node of the configuration.

    Args:
        node: A node with a `_target_`, of this or of an older version.
        **extra: Arguments beside or in place of the node's.

    Raises:
        ConfigError: if the constructor refuses an argument with a ValueError.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(renames.update_paths(node), **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise ConfigError(str(cause)) from error
        raise
