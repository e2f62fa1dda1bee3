"""From settings to a policy: tokenizer, network with its weights, adapter and precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from spg.config import ConfigError, build
from spg.core.errors import InputError
from spg.core.examples import Chat
from spg.core.process import place
from spg.models import base_weights
from spg.models.hub import CONFIG, WEIGHTS, config_fields, fetch, sizes
from spg.models.lora import add_adapter, set_base_name
from spg.models.network import Network
from spg.models.policy import Policy
from spg.models.quantization import check_nf4, prepare_nf4, quantize
from spg.models.weights import load_published, load_weights

log = logging.getLogger(__name__)

# settings that runs of version 0.3 do not have, and what held then
EARLIER_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "quantization": None,
    "precision": "32-true",
    "checkpointing": False,
    "compile": False,
}


def build_policy(cfg: DictConfig, find_base: Callable[[DictConfig], Path] = base_weights.existing) -> Policy:
    """Build the configured policy with its weights and its adapter.

    Weights are base, published, random or those of a file. Trained weights, of the network or of an adapter,
    are float32; others have the type model.dtype, or 4 bits. Networks with other than base weights are built
    on the device that uses them, tensor by tensor.

    Args:
        cfg: Configuration of a run or of another command.
        find_base: Returns the file of base weights for `cfg`. `spg.training.pretraining.ensure_base_weights`
            makes missing ones.

    Raises:
        ConfigError: if the weights are missing or do not fit.
    """
    check_quantization(cfg)
    model, device, dtype = cfg.model, device_of(cfg), _dtype(cfg)
    tokenizer: PreTrainedTokenizerBase = build(model.tokenizer)
    if model.weights == "base":
        network = _base_network(model, find_base(cfg)).to(dtype)
    elif model.weights == "random":
        seed = OmegaConf.select(cfg, "pretrain.seed", default=0)
        network = _random_network(model, tokenizer, device, dtype, seed)
    else:
        network = _loaded_network(model, tokenizer, device, dtype)
    set_base_name(network, base_name(cfg))
    network.checkpointing = setting(cfg, "checkpointing")
    policy = Policy(network, tokenizer, setting(cfg, "precision"))
    if model.lora is not None:
        policy.adapt(build(model.lora))
    if setting(cfg, "compile"):
        network.compile_layers()
    return policy


def build_adapter(cfg: DictConfig) -> tuple[Network, Any]:
    """Build a network without storage and an untrained adapter in it, with storage on the CPU.

    The base weights, which may be large or in 4 bits, are not read.
    """
    with torch.device("meta"):
        network: Network = build(cfg.model.network, seed=None)
        set_base_name(network, base_name(cfg))
        adapter = add_adapter(network, build(cfg.model.lora))
    for module in network.modules():
        for part in ("lora_A", "lora_B"):
            if hasattr(module, part):
                getattr(module, part).to_empty(device="cpu")
    return network, adapter


def device_of(cfg: DictConfig) -> torch.device:
    """Return the device that a process of a run or of another command computes on."""
    if OmegaConf.select(cfg, _accelerator_key(cfg)) == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place().local_rank)


def check_device(cfg: DictConfig) -> None:
    """Raise ConfigError if the settings need a CUDA device, or bitsandbytes, and there is none."""
    key = _accelerator_key(cfg)
    if OmegaConf.select(cfg, key) == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}=cuda: torch finds no CUDA device here; give {key}=cpu, or auto")
    check_quantization(cfg)


def check_quantization(cfg: DictConfig) -> None:
    """Raise ConfigError if the settings ask for weights in 4 bits, and device or library are missing."""
    if setting(cfg, "quantization") is None:
        return
    try:
        check_nf4(device_of(cfg))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_reads(cfg: DictConfig, prompt: str | Chat, asker: str) -> None:
    """Raise ConfigError if a prompt is a chat, and the model's tokenizer has no template for chats.

    Args:
        cfg: Configuration of a run or of another command.
        prompt: A prompt of the task.
        asker: The task's name, for the message.
    """
    if isinstance(prompt, str) or build(cfg.model.tokenizer).chat_template is not None:
        return
    name = cfg.model.tokenizer._target_.rpartition(".")[2]
    bare = "task.prompt_style=bare, or " if "prompt_style" in cfg.task else ""
    raise ConfigError(
        f"this model can't read chats, in which {asker} asks: its tokenizer ({name}) has no chat "
        f"template; choose {bare}an instruction-tuned model (model=...)"
    )


def base_name(cfg: DictConfig) -> str | None:
    """Return what an adapter's base weights are: a hub id, a folder or a file; None if they are random."""
    if cfg.model.weights == "random":
        return None
    if cfg.model.weights == "base":
        return base_weights.file_name(cfg)
    name = cfg.model.path if cfg.model.weights == "published" else cfg.model.weights
    return str(name)


def setting(cfg: DictConfig, name: str) -> Any:
    """Return a setting of the model; for a run of version 0.3 that lacks it, what held then."""
    if name == "precision" and name not in cfg.model and "trainer" in cfg:  # its place then
        return cfg.trainer.get(name, EARLIER_DEFAULTS[name])
    return cfg.model.get(name, EARLIER_DEFAULTS[name])


def _accelerator_key(cfg: DictConfig) -> str:
    return "trainer.accelerator" if "trainer" in cfg else "accelerator"


def _dtype(cfg: DictConfig) -> torch.dtype:
    """Return the type of the network's own weights: float32 if a run trains them."""
    trained = cfg.model.lora is None and "trainer" in cfg
    name: str = "float32" if trained else setting(cfg, "dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _base_network(model: DictConfig, path: Path) -> Network:
    """Build a small network with base weights."""
    network: Network = build(model.network)
    try:
        load_weights(network, path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    log.info("Weights: %s", path)
    return network


def _random_network(
    model: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype, seed: int
) -> Network:
    """Build a network with random weights on `device`."""
    network = _empty_network(model, tokenizer)
    network.to(dtype).to_empty(device=device)
    network.initialise(seed)
    if model.get("quantization") == "nf4":
        quantize(network, device, dtype)
    return network


def _loaded_network(
    model: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype
) -> Network:
    """Build a network with the weights of a file or a published folder, without a copy on the way."""
    nf4 = model.get("quantization") == "nf4"
    network = _empty_network(model, tokenizer)
    try:
        place = Path(model.weights)
        if model.weights == "published":
            place = fetch(model.path, model.get("revision"), WEIGHTS)
            if (place / CONFIG).is_file():  # else the shapes of the tensors show whether they fit
                _check_config(model, place, tokenizer)
        files = load_published(
            network, place, dtype, device, prepare_nf4(network, device, dtype) if nf4 else None
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    kept = "nf4 and " if nf4 else ""
    log.info(
        "Weights: %s (%d files), in %s%s on %s", place, files, kept, str(dtype).removeprefix("torch."), device
    )
    return network


def _empty_network(model: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Network:
    """Build a network without storage (on the meta device) that has a row of the head for each token."""
    with torch.device("meta"):
        network: Network = build(model.network, seed=None)
    if len(tokenizer) > network.head_width:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model's head {network.head_width} rows; "
            "give the tokenizer that belongs to the model (model.tokenizer)"
        )
    return network


def _check_config(model: DictConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if a published folder has other sizes than the settings, or another mask token.

    The settings have the sizes of a local folder already.
    """
    fields, file = config_fields(folder), folder / CONFIG
    own = model.network.config
    for name, value in sizes(model.network._target_, fields, file).items():
        if own[name] != value:
            raise InputError(
                f"model.network.config.{name}={own[name]}, but {file} of {model.path} says {value}; give "
                f"model.network.config.{name}={value}, or another model.path"
            )
    mask = fields.get("mask_token_id")
    if mask is not None and mask != tokenizer.mask_token_id:
        raise InputError(
            f"{file} says mask_token_id={mask}, and the tokenizer's mask is {tokenizer.mask_token} "
            f"({tokenizer.mask_token_id}); give the model's own tokenizer, or another model.path"
        )
