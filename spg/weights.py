"""Weights in safetensors files, written whole or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


def save_weights(network: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a network's tensors and a text metadata to `path`, under a temporary name first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, staged, metadata=dict(metadata))
    os.replace(staged, path)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Fill a network from `path`; raises ValueError where the file is missing, broken or another's."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give safetensors weights, or model.weights=base")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); give another, or make it anew") from error
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path} does not fit this model: {len(wrong)} tensors differ, first {name}: "
            f"{found.get(name, 'missing')} in the file, {own.get(name, 'none')} in the model"
        )
    network.load_state_dict(tensors)


def load_checkpoint(network: nn.Module, path: str | Path) -> None:
    """Fill a network with the trained tensors of a training checkpoint.

    Raises ValueError where the file is broken or its tensors are not those that the network trains.
    """
    prefix = "policy.network."
    found = {k.removeprefix(prefix): v for k, v in read_checkpoint(path)["state_dict"].items()}
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    wrong = sorted(n for n in own.keys() | found.keys() if n not in own or n not in found)
    wrong += [n for n in own if n in found and own[n].shape != found[n].shape]
    if wrong:
        raise ValueError(f"{path} does not fit this model: {len(wrong)} tensors differ, first {wrong[0]}")
    network.load_state_dict(found, strict=False)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a training checkpoint; raises ValueError where the file is missing, broken or another's."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a checkpoint that spg.train wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or "spg" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of spg.train")
    return checkpoint
