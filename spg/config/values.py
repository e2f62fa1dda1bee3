"""Every value of a configuration against its rule, which stands beside the part or the setting."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spg.config import parts, source
from spg.config.errors import ConfigError
from spg.config.knobs import unread_knobs
from spg.config.names import nearest
from spg.config.options import files, groups
from spg.config.renames import current_path
from spg.config.saved import load_saved
from spg.config.settings import NODES
from spg.core.rules import allows, words

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_SELECTION = re.compile(r"\$\{oc\.select:([\w.]+),[^}]*\}")


@dataclass(frozen=True)
class Node:
    """A node of a configuration and the part that its `_target_` names, if it has one that can be read."""

    key: str
    cfg: DictConfig
    part: parts.Part | None

    def get(self, name: str) -> Any:
        """Return the value of a parameter, or None."""
        return self.cfg.get(name)

    def fact(self, name: str, default: Any = None) -> Any:
        """Return a fact that the part's class declares."""
        return default if self.part is None else self.part.fact(name, default)


def nodes(cfg: DictConfig, key: str = "") -> Iterator[Node]:
    """Yield the nodes of a configuration, outer ones first, each once: interpolations are not followed.

    Raises:
        ConfigError: if a `_target_` does not exist.
    """
    target = cfg.get("_target_")
    yield Node(key, cfg, None if target is None else part_at(key, str(target)))
    for name in map(str, cfg):
        child = cfg._get_node(name)
        inner = f"{key}.{name}" if key else name
        if not name.startswith("_") and inner != "hydra":
            yield from _inside(child, inner)


def _inside(child: Any, key: str) -> Iterator[Node]:
    if not OmegaConf.is_config(child) or child._is_interpolation() or child._is_none() or child._is_missing():
        return
    if isinstance(child, DictConfig):
        yield from nodes(child, key)
    elif isinstance(child, ListConfig):
        for i in range(len(child)):
            yield from _inside(child._get_node(i), f"{key}[{i}]")


def part_at(key: str, target: str) -> parts.Part | None:
    """Return the part that a `_target_` names, or None if its source can't be read.

    Raises:
        ConfigError: if it does not exist; `key` says where it stands.
    """
    try:
        return parts.read(current_path(target))
    except source.AbsentError as error:
        where = f"{key}._target_" if key else "_target_"
        if not error.parent:
            raise ConfigError(
                f"{where}={target}: there is no module {error.name}; give a dotted path that can be "
                "imported: its folder must be on PYTHONPATH, or the package installed"
            ) from error
        names = [name for name in (*error.names, *_submodules(error.parent)) if not name.startswith("__")]
        guess = nearest(error.name, names)
        raise ConfigError(
            f"{where}={target}: {error.parent} has no {error.name}"
            + (f"; nearest: {error.parent}.{guess}" if guess else "")
        ) from error


def _submodules(name: str) -> list[str]:
    spec = source.spec(name)
    folders = None if spec is None else spec.submodule_search_locations
    return [] if folders is None else [info.name for info in pkgutil.iter_modules(list(folders))]


def rules(cfg: DictConfig) -> dict[str, list[Any]]:
    """Return the rules of each value that has any, by the key that a user sets.

    A part's `beta: ${beta}` gives a rule of the root key `beta`; several parts may each have their own.

    Raises:
        ConfigError: if a `_target_` does not exist, or its class takes no such key.
    """
    found: dict[str, list[Any]] = {}
    for node in nodes(cfg):
        known = _settings(node.key) if node.part is None else node.part.parameters or {}
        for name in map(str, node.cfg):
            if name.startswith("_"):
                continue
            key = f"{node.key}.{name}" if node.key else name
            if node.part is not None and not node.part.open and name not in known:
                _refuse(node, name)
            if known.get(name) is not None:
                own = found.setdefault(_key_of_value(cfg, node.cfg, name, key), [])
                own += [known[name]] if known[name] not in own else []
    for knob in unread_knobs(cfg):
        if knob not in found and (rule := _rule_of_shipped(knob)) is not None:
            found[knob] = [rule]
    return found


@cache
def _rule_of_shipped(knob: str) -> Any:
    """Return the rule of a root key that no selected part reads, from a shipped part that reads it.

    A multirun may select such a part in another job.
    """
    for path in (path for group in groups() for path in files(group)):
        if f"${{{knob}}}" not in path.read_text(encoding="utf-8"):
            continue
        option: Any = OmegaConf.to_container(load_saved(path) or DictConfig({}))
        names = [name for name, value in option.items() if value == f"${{{knob}}}"]
        part = parts.read(option["_target_"]) if names and "_target_" in option else None
        if part is not None and part.rule(names[0]) is not None:
            return part.rule(names[0])
    return None


@cache
def _settings(key: str) -> Mapping[str, Any]:
    return {name: rule for schema in NODES.get(key, ()) for name, rule in parts.hints(schema).items()}


def _refuse(node: Node, name: str) -> None:
    assert node.part is not None
    allowed = [key for key in node.part.parameters or {} if not key.startswith("*")]
    guess = nearest(name, allowed)
    raise ConfigError(
        f"{node.key}.{name}: {node.part.name} takes no {name!r}; allowed: {', '.join(allowed) or 'nothing'}"
        + (f"; nearest: {node.key}.{guess}" if guess else "")
    )


def _key_of_value(cfg: DictConfig, parent: DictConfig, name: str, key: str) -> str:
    """Return the key that a value comes from: that of a plain interpolation, else its own."""
    node = parent._get_node(name)
    written = node._value() if node is not None and node._is_interpolation() else None
    if not isinstance(written, str):
        return key
    match = _REFERENCE.fullmatch(written) or _SELECTION.fullmatch(written)
    if match is None or OmegaConf.select(cfg, match[1]) is None:
        return key
    above, _, last = match[1].rpartition(".")
    holder = OmegaConf.select(cfg, above) if above else cfg
    return _key_of_value(cfg, holder, last, match[1]) if isinstance(holder, DictConfig) else match[1]


def check_values(cfg: DictConfig) -> None:
    """Refuse values that their rules do not allow, keys that no part takes, and parts that do not exist.

    Raises:
        ConfigError: for the first of them, saying what is allowed.
    """
    for key, own in rules(cfg).items():
        try:
            value = OmegaConf.select(cfg, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for rule in own:
            if not allows(rule, value):
                raise ConfigError(f"{key}={value}: out of range; allowed: {words(rule)}")
