"""Low-rank adapters (LoRA) through peft: trained instead of the weights, saved as PEFT folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spg.core.rules import Count, Positive, Seed, Share, checked
from spg.models.network import Network

# a PEFT folder's tensors
TENSORS = "adapter_model.safetensors"


@checked
@dataclass(frozen=True)
class LoRA:
    """Settings of an adapter (Hu et al. 2021).

    Attributes:
        r: Rank.
        alpha: Products are scaled by alpha / r.
        dropout: Share of the inputs that is dropped before the adapter.
        targets: `released` for the matrices that the published runs adapted, or `all` of a layer.
        seed: Seed of the initial weights.
    """

    r: Count
    alpha: Positive
    dropout: Share
    targets: Literal["released", "all"]
    seed: Seed = 0

    def settings(self, network: Network) -> Any:
        """Return the configuration of peft for such an adapter in `network`."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=network.lora_targets[self.targets],
            bias="none",
        )


@checked
@dataclass(frozen=True)
class SavedLoRA:
    """The adapter in a PEFT folder, from this project or not, with its own settings."""

    folder: str
    seed: Seed = 0

    def settings(self, network: Network) -> Any:
        """Return the configuration in the folder.

        Raises:
            ValueError: if it can't be read, or the adapter is of another kind.
        """
        from peft import LoraConfig, PeftConfig

        path = Path(self.folder) / "adapter_config.json"
        if not path.is_file():  # else peft would look for it on the hub
            raise ValueError(f"{self.folder} is not a PEFT folder: it has no adapter_config.json")
        try:
            found = PeftConfig.from_pretrained(self.folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} can't be read as an adapter's configuration ({error})") from error
        if not isinstance(found, LoraConfig):
            raise ValueError(f"{path}: an adapter of kind {found.peft_type} can't be used; only LoRA can")
        found.base_model_name_or_path = vars(network).get("name_or_path")  # what it is put into now
        return found


def add_adapter(network: Network, lora: LoRA | SavedLoRA) -> Any:
    """Add an adapter to `network`, freeze all else, and return the PeftModel around the network.

    A saved adapter comes with its weights.

    Raises:
        ValueError: if saved weights do not fit the network.
    """
    adapter = _wrap(network, lora)
    if isinstance(lora, SavedLoRA):
        load_adapter(adapter, Path(lora.folder))
    return adapter


def check_fits(network: Network, lora: SavedLoRA) -> None:
    """Raise ValueError if a saved adapter does not fit `network`, which may have no storage (meta)."""
    _check_shapes(_wrap(network, lora), Path(lora.folder))


def _wrap(network: Network, lora: LoRA | SavedLoRA) -> Any:
    from peft import get_peft_model

    settings = lora.settings(network)
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        return get_peft_model(network, settings)


def set_base_name(network: Network, name: str | None) -> None:
    """Set the name of the base weights that the folder of an adapter will hold; None for no name."""
    vars(network)["name_or_path"] = name  # where peft reads it


def save_adapter(adapter: Any, folder: Path) -> None:
    """Write the adapter of a PeftModel to `folder`, whole or not at all."""
    staged = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    # by default peft asks the hub whether the vocabulary of the base model has grown
    adapter.save_pretrained(str(staged), save_embedding_layers=False)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def load_adapter(adapter: Any, folder: Path) -> None:
    """Load the adapter of a PeftModel from a PEFT folder; raise ValueError if it does not fit."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    _check_shapes(adapter, folder)
    set_peft_model_state_dict(adapter, load_peft_weights(str(folder), device="cpu"))


def _check_shapes(adapter: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is not a PEFT folder: it has no adapter_config.json")
    own = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    there = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = tensor_shapes(folder)
    wrong = sorted(n for n in there.keys() | found.keys() if there.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{folder} does not fit this model's adapter: {name} is {found.get(name, 'missing')} in it and "
            f"{there.get(name, 'not there')} here ({len(wrong)} tensors differ); give the model, and the "
            "model.lora settings, that it was trained with"
        )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a PEFT folder, by name, without reading the tensors.

    Raises:
        ValueError: if the file is missing or broken.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(f"{folder} has no {TENSORS}; give a PEFT folder with its weights")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); give another") from error


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of a network, and the LoRA layer whose product is added to it.

    Attributes:
        own: The tensor without the adapter.
        layer: The LoRA layer; None if the adapter does not change the tensor.
    """

    own: Tensor
    layer: Any = None

    def value(self, dtype: torch.dtype) -> Tensor:
        """Return W + alpha / r B A, computed in float32, on the CPU in `dtype`; W alone without a layer."""
        tensor = self.own.detach()
        if self.layer is not None:
            (name,) = self.layer.lora_A
            a, b = (getattr(self.layer, part)[name].weight.detach().float() for part in ("lora_A", "lora_B"))
            tensor = tensor.float() + self.layer.scaling[name] * (b @ a)
        return tensor.to("cpu", dtype).contiguous()


def merged_tensors(network: nn.Module) -> dict[str, MergedTensor]:
    """Return the tensors of a network by the names that they have without an adapter.

    A tensor with several names, such as a tied head, appears once, under the first name.
    """
    layers: Mapping[str, Any] = {
        f"{name}.base_layer.weight": module
        for name, module in network.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    found: dict[str, MergedTensor] = {}
    seen: set[int] = set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found[name.replace(".base_layer.", ".")] = MergedTensor(tensor, layers.get(name))
    return found
