"""Functions of torch that ask the driver, with answers of the pretended device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.utils._foreach_utils
from torch import Tensor

from tests.fake import tensors


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    if isinstance(tensor, tensors.PretendedTensor):
        raise RuntimeError("only tensors of the CPU can be pinned")
    pinned = tensor.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def _synchronize(device: Any = None) -> None:
    tensors._wait("synchronize")


def _tag(storage: Any) -> str | None:
    """Return the location that a file gives of a storage; None for one of the CPU."""
    return str(tensors.DEVICE) if getattr(storage, "pretended", False) else None


def _restore(storage: Any, location: str) -> Any:
    """Fail for tensors that a file was read to the device of: code must say where it wants them."""
    if location.startswith("cuda"):
        raise RuntimeError("a file with tensors of cuda:0 was read without map_location")


# before torch's own, which have the priorities 10 and more
torch.serialization.register_package(5, _tag, _restore)

# torch looks for fused operations on lists of these types
_FUSED_TYPES = [*torch.utils._foreach_utils._foreach_supported_types, tensors.PretendedTensor]

REPLACED: dict[str, Any] = {
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda._initialized": True,
    "torch.cuda.default_generators": (torch.default_generator,),
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.random.current_device": lambda: 0,
    "torch.cuda.set_device": lambda device: None,
    "torch.cuda._exchange_device": lambda device: 0,
    "torch.cuda._maybe_exchange_device": lambda device: 0,
    "torch.cuda.get_device_capability": lambda device=None: (9, 0),
    "torch.cuda.get_device_name": lambda device=None: "pretended",
    "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.synchronize": _synchronize,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.utils._foreach_utils._foreach_supported_types": _FUSED_TYPES,
    "torch.Tensor.pin_memory": _pin_memory,
}


@contextmanager
def replaced() -> Iterator[None]:
    """Let the functions answer for the device, and tensors of a module be replaced when it moves."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    patches = [mock.patch(name, value) for name, value in REPLACED.items()]
    try:
        for patch in patches:
            patch.start()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        # tensors are made of lists on the CPU, and go to the device by an operation that is seen
        torch._C._set_only_lift_cpu_tensors(True)
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for patch in reversed(patches):
            patch.stop()
