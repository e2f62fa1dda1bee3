"""Published models: where their files come from, and what their config.json says in our names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from spg.core.errors import InputError

log = logging.getLogger(__name__)

# seconds to wait for the hub's first answer, before looking for a cached copy
PATIENCE = 5.0
CONFIG = "config.json"
# files of a tokenizer, by the names that transformers gives them
TOKENIZER = ("*token*.json", "vocab.json", "merges.txt", "chat_template.*", CONFIG)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", CONFIG)


@dataclass(frozen=True)
class Family:
    """How the config.json of a network class is read.

    sizes: our names and theirs. fixed: what their fields may be for our class to compute the same; one that
    is absent is what it should be. implied: sizes that follow from others where theirs is null or absent.
    """

    sizes: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]]
    implied: Mapping[str, Callable[[Mapping[str, Any]], Any]]


LLADA_SIZES = (
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "mlp_hidden_size",
    "vocab_size",
    "embedding_size",
    "rope_theta",
    "rms_norm_eps",
)
QWEN3_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def _rope_theta(fields: Mapping[str, Any]) -> Any:
    """Return the base of plain rotary positions, where a file of transformers 5 has it."""
    rope = fields["rope_parameters"]
    return rope["rope_theta"] if rope.get("rope_type", "default") == "default" else None


FAMILIES = {
    "spg.models.qwen3.Qwen3Diffusion": Family(
        sizes={name: name for name in QWEN3_SIZES},
        fixed={
            "model_type": ("a2d-qwen3",),  # Qwen3's own checkpoints are of another kind: they look back only
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "rope_scaling": (None,),
            "use_sliding_window": (False,),
        },
        implied={
            "rope_theta": _rope_theta,
            "head_dim": lambda fields: fields["hidden_size"] // fields["num_attention_heads"],
        },
    ),
    "spg.models.llada.LLaDA": Family(
        sizes={name: name for name in LLADA_SIZES},
        fixed={
            "model_type": ("llada",),
            "block_type": ("llama",),
            "block_group_size": (1,),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "layer_norm_with_affine": (True,),
            "bias_for_layer_norm": (False, None),
            "attention_layer_norm": (False,),
            "input_emb_norm": (False,),
            "rope": (True,),
            "rope_full_precision": (True,),
            "alibi": (False,),
            "clip_qkv": (None,),
            "multi_query_attention": (False, None),
            "include_bias": (False,),
            "include_qkv_bias": (False, None),
            "weight_tying": (False,),
            "scale_logits": (False,),
        },
        implied={
            "n_kv_heads": lambda fields: fields["n_heads"],
            "embedding_size": lambda fields: fields["vocab_size"],
            "mlp_hidden_size": lambda fields: fields["mlp_ratio"] * fields["d_model"],
        },
    ),
}


def config_fields(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says; raises InputError where that is no JSON object."""
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}); get the folder's files again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no JSON object; get the folder's files again")
    return fields


def sizes(target: str, fields: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """Return the sizes, in our names, of the network class `target` that the fields of a config.json give.

    Raises InputError where the fields are of another kind of model, or one is missing.
    """
    name = target.rpartition(".")[2]
    if target not in FAMILIES:
        raise InputError(f"{where} can't be read for {name}; give model.weights=<a safetensors file> instead")
    family = FAMILIES[target]
    other = [
        f"{field}={fields[field]} (not {' or '.join(str(v) for v in values)})"
        for field, values in family.fixed.items()
        if field in fields and fields[field] not in values
    ]
    if other:
        raise InputError(
            f"{where} is of another model than {name}: {', '.join(other)}; choose the model that it is of "
            "(model=...), or another model.path"
        )
    found: dict[str, Any] = {}
    missing = []
    for ours, theirs in family.sizes.items():
        value = fields.get(theirs)
        if value is None and ours in family.implied:
            try:
                value = family.implied[ours](fields)
            except (KeyError, TypeError):
                value = None
        if value is None:
            missing.append(theirs)
        found[ours] = value
    if missing:
        raise InputError(
            f"{where} is no config.json of {name}: it has no {', '.join(missing)}; choose the model that it "
            "is of (model=...), or another model.path"
        )
    return found


def folder_of(path: str, revision: str | None, files: Sequence[str]) -> Path:
    """Return the folder at `path`, or that of a hub id's files, those that match `files`, fetched if need be.

    Raises InputError where there is no such folder and the hub does not have it, or can't be reached and
    nothing of it is cached.
    """
    if Path(path).is_dir():
        return Path(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is None:
        raise InputError(
            f"model.path={path} is no folder, nor the name of a model on the hub (owner/name); give one"
        )
    import huggingface_hub

    answers = _hub_answers(path, revision)
    try:
        found = huggingface_hub.snapshot_download(
            path, revision=revision, allow_patterns=list(files), local_files_only=not answers
        )
    except Exception as error:  # its classes change with the hub's HTTP library
        at = path if revision is None else f"{path} (model.revision={revision})"
        why = _line(error) if answers else "it does not answer, and no copy is cached here"
        raise InputError(
            f"the model {at} can't be had from the hub ({why}): connect to the network, or give a folder "
            "with its config.json, safetensors and tokenizer files: model.path=<folder>"
        ) from error
    return Path(found)


@lru_cache(maxsize=8)
def _hub_answers(path: str, revision: str | None) -> bool:
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(path, revision=revision, timeout=PATIENCE)
    except huggingface_hub.errors.HfHubHTTPError as error:
        log.debug("The hub refuses %s: %s", path, _line(error))  # fetching will tell why
    except Exception as error:  # noqa: BLE001  # its class changes with the hub's HTTP library
        log.debug("The hub does not answer for %s: %s", path, _line(error))
        return False
    return True


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
