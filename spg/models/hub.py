"""Published models: where their files come from, and what their config.json says.

A network class declares beside itself how its config.json is read, in three literal class attributes that are
read from the source text, without torch:

- `published_sizes`: the fields that give the network's sizes, named as in the class's configuration.
- `published_fixed`: fields and the values that the class can compute with. An absent field is fine.
- `published_implied`: sizes that follow from other fields if their own is null or absent, as a field's name
  or two of them joined by `*` or `//`. A dot leads to a field of a field.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spg.config import ConfigError, check, make_paths_absolute, parts
from spg.core.errors import InputError
from spg.core.hub import hub_answers, one_line

log = logging.getLogger(__name__)

CONFIG = "config.json"
# files of a tokenizer, by the names that transformers gives them
TOKENIZER = ("*token*.json", "vocab.json", "merges.txt", "chat_template.*", CONFIG)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", CONFIG)

# stands for a field that a config.json does not have
ABSENT = object()


def settle(cfg: DictConfig) -> DictConfig:
    """Complete a configuration from what lies on this machine, before torch is imported.

    Local paths become absolute. If model.path is a folder with a config.json, its sizes take the place of
    those in `cfg`; a hub id is looked at when its weights are loaded.

    Returns:
        `cfg` itself if nothing changes, else a changed copy.

    Raises:
        ConfigError: if the folder holds another kind of model.
    """
    cfg = make_paths_absolute(cfg)
    path = None if "model" not in cfg else cfg.model.get("path")
    if path is None or cfg.model.weights != "published" or not (Path(path) / CONFIG).is_file():
        return cfg
    file = Path(path) / CONFIG
    try:
        found = sizes(cfg.model.network._target_, config_fields(Path(path)), file)
    except InputError as error:
        raise ConfigError(str(error)) from error
    settled = cfg.copy()
    own = settled.model.network.config
    other = {name: value for name, value in found.items() if own[name] != value}
    if other:
        words = ", ".join(f"{name}={value} (not {own[name]})" for name, value in other.items())
        log.info("Sizes of the model from %s: %s", file, words)
    for name, value in other.items():
        own[name] = value
    check(settled)
    return settled


def config_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json.

    Raises:
        InputError: if the file is missing or holds no JSON object.
    """
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}); get the folder's files again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no JSON object; get the folder's files again")
    return fields


def sizes(target: str, fields: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """Return the sizes of a network that a config.json gives.

    Args:
        target: Dotted name of the network class.
        fields: The fields of the config.json.
        where: The file, for the messages.

    Raises:
        InputError: if the fields describe another kind of model, or if a size is missing.
    """
    name = target.rpartition(".")[2]
    part = parts.read(target)
    if part is None or not part.fact("published_sizes"):
        raise InputError(f"{where} can't be read for {name}; give model.weights=<a safetensors file> instead")
    other = [
        f"{field}={value} (not {' or '.join(map(str, allowed))})"
        for field, allowed in part.fact("published_fixed", {}).items()
        if (value := _look_up(fields, field)) is not ABSENT and value not in allowed
    ]
    if other:
        raise InputError(
            f"{where} describes another model than {name}: {', '.join(other)}; choose that model "
            "(model=...), or another model.path"
        )
    implied = part.fact("published_implied", {})
    found = {}
    for size in part.fact("published_sizes"):
        value = fields.get(size)
        found[size] = _implied(implied[size], fields) if value is None and size in implied else value
    missing = [size for size, value in found.items() if value is None]
    if missing:
        raise InputError(
            f"{where} is not a config.json of {name}: it has no {', '.join(missing)}; choose the model that "
            "it describes (model=...), or another model.path"
        )
    return found


def _look_up(fields: Mapping[str, Any], dotted: str) -> Any:
    """Return a field, or a field of a field; ABSENT if there is none."""
    value: Any = fields
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def _implied(expression: str, fields: Mapping[str, Any]) -> Any:
    """Return the value of `field`, `field * field` or `field // field`; None if a field has no number."""
    first, operator, second = (*expression.split(), "", "")[:3]
    values = [_look_up(fields, name) for name in (first, second) if name]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return None
    if not operator:
        return values[0]
    return values[0] * values[1] if operator == "*" else values[0] // values[1]


def fetch(path: str, revision: str | None, files: Sequence[str]) -> Path:
    """Return the folder of a published model, fetched from the hub if `path` is a hub id.

    Args:
        path: A folder, or a hub id (owner/name).
        revision: Branch, tag or commit of the hub id; None for its main branch.
        files: Patterns of the files that are needed.

    Raises:
        InputError: if there is no such folder, and the hub does not have it or can't be reached while no
            copy is cached.
    """
    if Path(path).is_dir():
        return Path(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is None:
        raise InputError(
            f"model.path={path} is not a folder, nor the name of a model on the hub (owner/name); give one"
        )
    import huggingface_hub

    answers = hub_answers("model", path, revision)
    try:
        found = huggingface_hub.snapshot_download(
            path, revision=revision, allow_patterns=list(files), local_files_only=not answers
        )
    except Exception as error:  # its classes change with the hub's HTTP library
        at = path if revision is None else f"{path} (model.revision={revision})"
        why = one_line(error) if answers else "it does not answer, and no copy is cached here"
        raise InputError(
            f"the model {at} can't be had from the hub ({why}): connect to the network, or give a folder "
            "with its config.json, safetensors and tokenizer files: model.path=<folder>"
        ) from error
    return Path(found)
