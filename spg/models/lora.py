"""Low-rank adapters (LoRA) through peft: trained instead of the weights, saved as PEFT folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
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


def keep_input_types(adapter: Any) -> None:
    """Let the layers of a PeftModel leave the type of their inputs to autocast.

    peft copies inputs to the adapter's float32, which autocast copies back to bfloat16 at once.
    """
    for layer in adapter.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = False


class FusedLayer:
    """A LoRA layer's forward pass for decoding: W x, and alpha / r B A x added to it in place.

    peft's own takes the same products, and then scales, adds, and casts inputs and matrices, at each step.
    Here the matrices are scaled and cast once for each rollout. W stays as it is: added to a bfloat16 matrix,
    most of a young adapter would be rounded away.

    Args:
        layer: The LoRA layer of a linear one.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.down: Tensor | None = None  # A [r in]
        self.up: Tensor | None = None  # alpha / r B, transposed [r out]

    @classmethod
    def of(cls, adapter: Any) -> list[FusedLayer]:
        """Return those of a PeftModel's layers that are a product and nothing more."""
        return [cls(module) for module in adapter.modules() if _is_plain(module)]

    def fill(self, dtype: torch.dtype) -> None:
        """Take the adapter's matrices as they are now, in the type of the products."""
        (name,) = self.layer.active_adapters
        a, b = (getattr(self.layer, part)[name].weight.detach() for part in ("lora_A", "lora_B"))
        self.down, self.up = a.to(dtype), (b * self.layer.scaling[name]).to(dtype).t()

    def clear(self) -> None:
        """Drop the matrices."""
        self.down = self.up = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs [... out] of inputs [... in], without dropout."""
        if self.layer.disable_adapters:
            own: Tensor = self.layer.base_layer(x)
            return own
        assert self.down is not None
        assert self.up is not None
        x = x.to(self.down.dtype)
        result: Tensor = self.layer.base_layer(x)
        inner = F.linear(x, self.down)
        result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self.up)
        return result


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is a LoRA layer of a linear layer, without a variant such as DoRA."""
    names = list(getattr(module, "lora_A", ()))
    return (
        hasattr(module, "base_layer")
        and len(names) == 1
        and not getattr(module, "lora_variant", None)
        and not any(getattr(module, "lora_bias", {}).values())
        and all(isinstance(getattr(module, part)[names[0]], nn.Linear) for part in ("lora_A", "lora_B"))
    )


@contextmanager
def fused(layers: list[FusedLayer], lower: torch.dtype | None) -> Iterator[None]:
    """Let LoRA layers take their `FusedLayer.forward` for the time of a `with` block.

    Args:
        layers: The layers.
        lower: The type that autocast computes in; None without autocast. Then a layer whose own matrix has
            another type than the adapter (bfloat16 or 4 bits) keeps peft's forward pass.
    """
    used = []
    for one in layers:
        adapter, own = next(one.layer.lora_A.parameters()), one.layer.base_layer.weight
        if lower is not None or adapter.dtype == own.dtype:
            used.append(one)
            one.fill(adapter.dtype if lower is None else lower)
    forwards = [one.forward for one in used]
    try:
        for one, forward in zip(used, forwards, strict=True):
            one.layer.forward = forward
        yield
    finally:
        for one in used:
            vars(one.layer).pop("forward", None)
            one.clear()


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
