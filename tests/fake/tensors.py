"""Tensors that say that they are on cuda:0, and hold their values on the CPU.

Under `pretending()` torch makes such tensors wherever code asks for the device "cuda". They take the branches
of a GPU in our code, in torch, peft and Lightning. Each operation on them is computed on the CPU. Beforehand
it is checked and counted:

- an operation on tensors of two devices fails, as it would on a GPU;
- `kernels`: operations for which a GPU would be given something to compute, at least one kernel each;
- `waits`: operations for which the host would wait until the device has done all that it was given;
- `copies`: tensors that go to the device without a wait.

Neither time nor memory is measured, and a GPU's own kernels, with their rounding, are not run.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.fake.kernels import ON_CPU

DEVICE = torch.device("cuda:0")
SOURCES = str(Path(__file__).parents[2] / "spg") + "/"

# operations that only describe memory in another way, or reserve it
NO_KERNEL = {"lift_fresh", "_unsafe_view", "_reshape_alias", "resize_", "set_", "detach_", "record_stream"}
RESERVING = ("empty", "new_empty")
# operations whose result, or its size, the host has to know
READING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "equal",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class TwoDevicesError(RuntimeError):
    """An operation got tensors of the CPU and of the device."""


@dataclass
class Counts:
    """What the device was asked for.

    Attributes:
        kernels: Operations by their names.
        waits: Waits of the host, by operation and place in the code.
        copies: Copies to the device without a wait, by place in the code.
        casts: Kernels that only make another type of a tensor.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    casts: int = 0


_counting: list[Counts] = []
_inner_device = torch.device("cpu")


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what the block asks of the device."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def _wait(operation: str) -> None:
    for counts in _counting:
        counts.waits[f"{place()}: {operation}"] += 1


def place() -> str:
    """Return the function of `spg` that is being executed; `backward` for one that autograd executes."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCES):
            return frame.f_code.co_qualname
        frame = frame.f_back  # type: ignore[assignment]
    return "backward" if _in_backward() else "elsewhere"


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class PretendedTensor(Tensor):
    """A tensor of the pretended device; `inner` has its values, on the CPU."""

    inner: Tensor
    # Python functions of torch see an ordinary tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return execute(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be saved as a tensor of a GPU is; the file then says cuda:0."""
        inner = self.inner.detach()
        storage = inner.untyped_storage()
        storage.pretended = True
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=inner.dtype, _internal=True)
        shape = inner.storage_offset(), tuple(inner.shape), inner.stride()
        return torch._utils._rebuild_tensor_v2, (typed, *shape, self.requires_grad, OrderedDict())

    def numpy(self, *, force: bool = False) -> Any:
        """Fail, as a tensor of a GPU does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def tolist(self) -> Any:
        """Return the values, for which the host waits."""
        _wait("tolist")
        return self.inner.tolist()

    @property
    def data(self) -> Tensor:
        """The tensor without its history; assigning replaces the values."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, PretendedTensor):
            raise TwoDevicesError("a tensor of the CPU can't become the data of one of the device")
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.inner = new.inner


def execute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Check, count and compute an operation."""
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    device = kwargs.get("device")
    to_device = bool(own) if device is None else torch.device(device).type == "cuda"
    if name == "_pin_memory":
        return args[0]
    if name == "copy_":
        to_device = isinstance(args[0], PretendedTensor)
    between = name in ("copy_", "_to_copy") and _transfer(name, args, kwargs, to_device)
    if own and name not in ("copy_", "_to_copy"):
        _check_devices(func, name, args, others)
    if own and _reads(name, args, kwargs):
        _wait(name)
    if (own or to_device) and launches(func, name) and not between:
        for counts in _counting:
            counts.kernels[name] += 1
            counts.casts += name == "_to_copy" and kwargs.get("dtype") not in (None, args[0].dtype)
    if device is not None and to_device:
        kwargs = {**kwargs, "device": _inner_device}
    elif name == "copy_" and own and not to_device and _inner_device.type == "meta":
        raise RuntimeError("tensors without values can't be copied to the CPU")
    known = {id(tensor.inner): tensor for tensor in own}
    values = ON_CPU.get(str(func), func)(*tree_map(_inner, args), **tree_map(_inner, kwargs))

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return PretendedTensor(value) if to_device and not isinstance(value, PretendedTensor) else value

    return tree_map(wrap, values)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendedTensor) else value


def _check_devices(func: Any, name: str, args: Sequence[Any], others: Sequence[Tensor]) -> None:
    """Raise TwoDevicesError for tensors of the CPU, except for single numbers and for indices."""
    if name in INDEXING:
        indices = [index for index in tree_leaves(args[1]) if isinstance(index, Tensor)]
        for index in indices:
            if not isinstance(index, PretendedTensor):
                _wait(f"{name} with indices of the CPU")
        others = [tensor for tensor in others if not any(tensor is index for index in indices)]
    wide = [tuple(tensor.shape) for tensor in others if tensor.dim() > 0]
    if wide:
        raise TwoDevicesError(f"{func} got tensors of the CPU beside those of cuda:0; their shapes: {wide}")


def _transfer(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], to_device: bool) -> bool:
    """Count a copy, if it is between the devices; return whether it is."""
    source = args[1] if name == "copy_" else args[0]
    from_device = isinstance(source, PretendedTensor)
    if from_device == to_device:
        return False
    asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    # without pinned memory torch waits; a copy to the CPU is read at once
    if to_device and asynchronous and getattr(source, "pinned", False):
        for counts in _counting:
            counts.copies[place()] += 1
    else:
        _wait("copy to the device" if to_device else "copy to the CPU")
    return True


def _reads(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the host waits for an operation's result, or for its size."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name not in INDEXING:
        return name in READING
    masks = [
        i for i in tree_leaves(args[1]) if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
    ]
    if not masks:
        return False
    # torch turns this into masked_fill
    single = name.startswith(("index_put", "_index_put")) and len(masks) == 1 and args[2].numel() == 1
    return not (single and sum(index is not None for index in args[1]) == 1)


def launches(func: Any, name: str) -> bool:
    """Return whether an operation gives a GPU something to compute."""
    nothing = func.is_view or name in NO_KERNEL or name == "_local_scalar_dense" or name.startswith(RESERVING)
    return not nothing


class _Executing(TorchDispatchMode):
    """Executes what makes tensors of the device out of none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return execute(func, args, kwargs or {})


@contextmanager
def pretending(values: bool = True) -> Iterator[None]:
    """Let torch find one CUDA device; without `values` its tensors only have sizes, and take no memory."""
    from tests.fake.functions import replaced

    global _inner_device
    before, _inner_device = _inner_device, torch.device("cpu" if values else "meta")
    try:
        with replaced(), _Executing():
            yield
    finally:
        _inner_device = before
