"""Low-rank adapters (LoRA) through peft: trained instead of the weights, saved as PEFT folders."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spg.limits import check_limits
from spg.models.network import Network


@dataclass(frozen=True)
class LoRA:
    """Numbers of an adapter: rank, scale alpha / rank, dropout before it, which matrices, initial seed.

    targets: `released`, the matrices that the published runs really adapted, or `all` of a layer.
    Raises ValueError where one is out of range.
    """

    r: int
    alpha: float
    dropout: float
    targets: str
    seed: int = 0

    def __post_init__(self) -> None:
        check_limits(**vars(self))


def add_adapter(network: Network, lora: LoRA) -> Any:
    """Put an adapter into `network`, freeze all else, and return the PeftModel around it."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=network.lora_targets[lora.targets],
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        return get_peft_model(network, settings)


def save_adapter(adapter: Any, folder: Path) -> None:
    """Write a PeftModel's adapter to `folder`, whole or not at all."""
    staged = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    adapter.save_pretrained(str(staged))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def load_adapter(adapter: Any, folder: Path) -> None:
    """Fill a PeftModel's adapter from a PEFT folder; raises ValueError where it does not fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is no PEFT folder: it has no adapter_config.json")
    tensors = load_peft_weights(str(folder), device="cpu")
    own = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(adapter).items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if own != found:
        name = min(n for n in own.keys() | found.keys() if own.get(n) != found.get(n))
        raise ValueError(
            f"{folder} does not fit this model's adapter: {name} is {found.get(name, 'missing')} in it and "
            f"{own.get(name, 'not there')} here; give the model.lora settings that it was trained with"
        )
    set_peft_model_state_dict(adapter, tensors)
