"""Weights in 4 bits (nf4) by bitsandbytes, for the frozen layers of a network with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from spg.models.network import Network


def check_nf4(device: torch.device) -> None:
    """Raise ValueError if weights can't be kept in nf4: without CUDA, or without bitsandbytes."""
    needs = []
    if device.type != "cuda":
        needs.append(f"a CUDA device (this is {device.type})")
    if find_spec("bitsandbytes") is None:
        needs.append("bitsandbytes (pip install 'spg[nf4]')")
    if needs:
        raise ValueError(
            f"model.quantization=nf4 needs {' and '.join(needs)}; give model.quantization=null, with "
            "model.dtype=bfloat16 for the smallest weights that work everywhere"
        )


def prepare_nf4(
    network: Network, device: torch.device, dtype: torch.dtype
) -> Callable[[str, Tensor], nn.Parameter | None]:
    """Replace the matrices in a network's layers by 4-bit ones, and return a function that fills them.

    The scales are quantized too (double quantization of QLoRA, Dettmers et al. 2023).

    Args:
        network: The network, which may have no storage (meta).
        device: Where the quantized parameters lie.
        dtype: Type of the products.

    Returns:
        A function of a parameter's name and tensor [out in]. It returns the quantized parameter, or None for
        a parameter that keeps its type: head, embedding and norms.
    """
    import bitsandbytes

    inside = {id(module) for layer in network.layers for module in layer.modules()}
    made = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and id(module) in inside:
            with torch.device("meta"):
                small = bitsandbytes.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                )
            network.set_submodule(name, small)
            made[f"{name}.weight"] = small
    vars(network)["is_loaded_in_4bit"] = True  # where peft reads it

    def fill(name: str, tensor: Tensor) -> nn.Parameter | None:
        if name not in made:
            return None
        whole = bitsandbytes.nn.Params4bit(
            tensor.to(dtype),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=made[name],
        )
        small: nn.Parameter = whole.to(device)  # this quantizes
        return small

    return fill


def quantize(network: Network, device: torch.device, dtype: torch.dtype) -> None:
    """Quantize the layers of a network that has its weights, on `device`."""
    whole = dict(network.named_parameters())
    fill = prepare_nf4(network, device, dtype)
    for name, parameter in whole.items():
        small = fill(name, parameter.detach())
        if small is not None:
            path, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(path), leaf, small)
