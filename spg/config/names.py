"""Names: the keys of a configuration, and the nearest right name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from omegaconf import DictConfig


def keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all leaves of a configuration, without class names."""
    names: list[str] = []
    for key in map(str, cfg):
        node = cfg._get_node(key)
        if key.startswith("_"):
            continue
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            names += keys(node, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


def is_known(cfg: DictConfig, key: str) -> bool:
    """Return whether `key` names a leaf or a node of the configuration."""
    return any(name == key or name.startswith(f"{key}.") for name in keys(cfg))


def nearest(given: str, allowed: Sequence[str]) -> str | None:
    """Return the allowed names that a mistyped one most likely meant, or None."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    if close:
        return close[0]
    ends = [name.rpartition(".")[2] for name in allowed]
    close_ends = difflib.get_close_matches(given.rpartition(".")[2], ends, n=1, cutoff=0.6)
    found = [name for name, end in zip(allowed, ends, strict=True) if end in close_ends]
    return " or ".join(found) or None
