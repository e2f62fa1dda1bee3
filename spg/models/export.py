"""A trained model as a folder: config.json, sharded safetensors and tokenizer; or a PEFT folder.

The layout is that of the published models, tensor by tensor, so that whatever reads these reads an export.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from spg.core.errors import InputError, RunError
from spg.core.files import DISK_FULL, write_json
from spg.models.hub import CONFIG, config_fields, fetch
from spg.models.lora import TENSORS, MergedTensor, merged_tensors, save_adapter
from spg.models.network import Network
from spg.models.weights import INDEX


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write to, which becomes `output` at the end, whole or not at all.

    Raises:
        InputError: if the folder can't be made.
        RunError: if safetensors can't write to it. A full disk raises OSError.
    """
    staged = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"output={output} can't be made ({error}); give a folder that can be") from error
    try:
        yield staged
        os.replace(staged, output)
    except SafetensorError as error:
        raise RunError(
            f"{output} can't be written ({error}); make room, or give another output=..."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_model(
    network: Network,
    tokenizer: PreTrainedTokenizerBase,
    model: DictConfig,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    """Write weights, config.json and tokenizer of a network; an adapter is merged into the weights.

    Args:
        network: The trained network.
        tokenizer: Its tokenizer.
        model: Settings of the run's model.
        folder: Where to write.
        dtype: Type of the weights in the files; None for each tensor's own.
        shard_bytes: Size of a file of weights, at most.
    """
    most_common = write_weights(merged_tensors(network), folder, dtype, shard_bytes)
    write_json(folder / CONFIG, config_json(network, tokenizer, model, most_common))
    tokenizer.save_pretrained(str(folder))


def write_adapter(adapter: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the PEFT folder of an adapter, with its tensors in `dtype` if one is given."""
    save_adapter(adapter, folder)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / TENSORS).items()}
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def write_weights(
    tensors: Mapping[str, MergedTensor], folder: Path, dtype: torch.dtype | None, shard_bytes: int
) -> torch.dtype:
    """Write tensors to one file, or to several files and an index.

    Args:
        tensors: The tensors by their published names.
        folder: Where to write.
        dtype: Type of the tensors in the files; None for each one's own.
        shard_bytes: Size of a file, at most; a larger tensor has a file of its own.

    Returns:
        The type that most of the written tensors have.
    """
    dtypes = {name: dtype or tensor.own.dtype for name, tensor in tensors.items()}
    sizes = {name: tensor.own.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():  # the tensors of one file at a time
        values = {name: tensors[name].value(dtypes[name]) for name in names}
        save_file(values, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return Counter(dtypes.values()).most_common(1)[0][0]


def config_json(
    network: Network, tokenizer: PreTrainedTokenizerBase, model: DictConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the fields of config.json: of the base model and the network, and the special tokens."""
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    kind = {"torch_dtype": str(dtype).removeprefix("torch.")}
    own = network.published_config()
    if model.weights == "published":  # its fields agree with the network's, and may be more
        base = _base_fields(model)
        own |= {name: value for name, value in base.items() if value is not None or name not in own}
    return own | ids | kind


def _base_fields(model: DictConfig) -> dict[str, Any]:
    """Return the fields of the base model's config.json that hold for every copy of it."""
    path = model.get("path")
    if path is None:
        return {}
    found = config_fields(fetch(path, model.revision, [CONFIG]))
    for name in ("_name_or_path", "quantization_config", "transformers_version", "dtype"):
        found.pop(name, None)
    # code in a folder is not copied; the name of code in a repository still holds
    hub = "" if Path(path).is_dir() else f"{path}--"
    code = {key: str(value) for key, value in found.pop("auto_map", {}).items()}
    code = {
        key: value if "--" in value else hub + value for key, value in code.items() if hub or "--" in value
    }
    return found | ({"auto_map": code} if code else {})
