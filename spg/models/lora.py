"""Low-rank adapters (LoRA) through peft: trained instead of the weights, saved as PEFT folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spg.core.limits import check_limits
from spg.models.network import Network

# a PEFT folder's tensors
TENSORS = "adapter_model.safetensors"


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

    def settings(self, network: Network) -> Any:
        """Return peft's configuration of such an adapter in `network`."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=network.lora_targets[self.targets],
            bias="none",
        )


@dataclass(frozen=True)
class SavedLoRA:
    """The adapter of a PEFT folder, ours or another's, whose own numbers decide."""

    folder: str
    seed: int = 0

    def settings(self, network: Network) -> Any:
        """Return the folder's configuration; raises ValueError where it can't be read or is no LoRA's."""
        from peft import LoraConfig, PeftConfig

        path = Path(self.folder) / "adapter_config.json"
        if not path.is_file():  # else peft would look for it on the hub
            raise ValueError(f"{self.folder} is no PEFT folder: it has no adapter_config.json")
        try:
            found = PeftConfig.from_pretrained(self.folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} can't be read as an adapter's configuration ({error})") from error
        if not isinstance(found, LoraConfig):
            raise ValueError(f"{path}: an adapter of kind {found.peft_type} can't be used; only LoRA can")
        found.base_model_name_or_path = vars(network).get("name_or_path")  # what it is put into now
        return found


def add_adapter(network: Network, lora: LoRA | SavedLoRA) -> Any:
    """Put an adapter into `network`, freeze all else, and return the PeftModel around it.

    A saved one comes with its weights; raises ValueError where these do not fit the network.
    """
    adapter = _around(network, lora)
    if isinstance(lora, SavedLoRA):
        load_adapter(adapter, Path(lora.folder))
    return adapter


def check_fits(network: Network, lora: SavedLoRA) -> None:
    """Raise ValueError where a saved adapter does not fit `network`, which may be without storage (meta)."""
    _check_shapes(_around(network, lora), Path(lora.folder))


def _around(network: Network, lora: LoRA | SavedLoRA) -> Any:
    from peft import get_peft_model

    settings = lora.settings(network)
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        return get_peft_model(network, settings)


def name_base(network: Network, name: str | None) -> None:
    """Tell what the network's own weights are, so that an adapter's folder names it; None: nothing."""
    vars(network)["name_or_path"] = name  # where peft looks for it


def save_adapter(adapter: Any, folder: Path) -> None:
    """Write a PeftModel's adapter to `folder`, whole or not at all."""
    staged = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    # peft's default would ask the hub whether the base model's vocabulary has grown
    adapter.save_pretrained(str(staged), save_embedding_layers=False)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def load_adapter(adapter: Any, folder: Path) -> None:
    """Fill a PeftModel's adapter from a PEFT folder; raises ValueError where it does not fit."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    _check_shapes(adapter, folder)
    set_peft_model_state_dict(adapter, load_peft_weights(str(folder), device="cpu"))


def _check_shapes(adapter: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is no PEFT folder: it has no adapter_config.json")
    own = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    there = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = shapes(folder)
    wrong = sorted(n for n in there.keys() | found.keys() if there.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{folder} does not fit this model's adapter: {name} is {found.get(name, 'missing')} in it and "
            f"{there.get(name, 'not there')} here ({len(wrong)} tensors differ); give the model, and the "
            "model.lora settings, that it was trained with"
        )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a PEFT folder's tensors, by name, reading none of them.

    Raises ValueError where the file is missing or broken.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(f"{folder} has no {TENSORS}; give a PEFT folder with its weights")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); give another") from error


@dataclass(frozen=True)
class Merged:
    """One tensor of a network without its adapter's parts: what it is, and the LoRA layer that changes it."""

    own: Tensor
    layer: Any = None

    def value(self, dtype: torch.dtype) -> Tensor:
        """Return W, or W + alpha / r B A computed in float32, on the CPU in `dtype`."""
        tensor = self.own.detach()
        if self.layer is not None:
            (name,) = self.layer.lora_A
            a, b = (getattr(self.layer, part)[name].weight.detach().float() for part in ("lora_A", "lora_B"))
            tensor = tensor.float() + self.layer.scaling[name] * (b @ a)
        return tensor.to("cpu", dtype).contiguous()


def merged(network: nn.Module) -> dict[str, Merged]:
    """Return a network's tensors under the names that they have without an adapter.

    Of tensors that are one and the same, as a tied head, the first name stands for all.
    """
    layers: Mapping[str, Any] = {
        f"{name}.base_layer.weight": module
        for name, module in network.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    found: dict[str, Merged] = {}
    seen: set[int] = set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found[name.replace(".base_layer.", ".")] = Merged(tensor, layers.get(name))
    return found
