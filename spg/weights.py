"""Weights in safetensors files, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

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
    """Fill a network with the policy's weights of a training checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "policy.network."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
