"""Tensors without numbers, on which the real modules run, and the ledger of what they would take.

A `Phantom` has a shape, a type and a place in memory that nothing fills. Operations on phantoms give
phantoms. Operations on ordinary tensors alone run as ever: masks, positions and token ids have real values,
so that code that reads values runs too. A `Ledger` counts each operation, and the bytes of all tensors alive.

Autograd and autocast take phantoms for tensors of the CPU. Code that asks a phantom for its device is told
the device that is planned for, within `Pretence`, and gets the operations of that device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward as engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spg.planning.operations import count_operations, is_free

CPU = torch.device("cpu")
Named = Mapping[str, Any] | None


class Phantom(Tensor):
    """A tensor without numbers.

    Attributes:
        shape_of: A tensor of the meta device, which stands for the memory.
        planned: The device that all phantoms say they are on; see `Pretence`.
    """

    shape_of: Tensor
    planned: ClassVar[torch.device] = CPU
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape_of: Tensor) -> Phantom:
        """Return a phantom with the shape, type and place of a tensor of the meta device."""
        made: Phantom = Tensor._make_wrapper_subclass(
            cls,
            shape_of.size(),
            strides=shape_of.stride(),
            storage_offset=shape_of.storage_offset(),
            dtype=shape_of.dtype,
            device=CPU,
            requires_grad=False,
        )
        made.shape_of = shape_of
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The planned device, as far as Python code asks."""
        return Phantom.planned

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Whether the planned device is one of CUDA."""
        return Phantom.planned.type == "cuda"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a phantom with a place of its own; a parameter stays one."""
        copied: Tensor = Phantom(torch.empty_like(self.shape_of))
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Phantom({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Named = None
    ) -> Any:
        """Run an operation outside of a ledger, which counts nothing."""
        return run_on_shapes(func, args, kwargs or {})


def run_on_shapes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the shapes of its arguments; its results are phantoms.

    An argument that the operation writes to comes back as itself.
    """
    owners: dict[int, Tensor] = {}
    given = [_enter(value, owners) for value in args]
    named = {name: _enter(value, owners) for name, value in kwargs.items()}
    return _leave(func(*given, **named), owners)


# not closures of the function above: a function that knows itself is freed late, and with it all tensors
def _enter(value: Any, owners: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        inner = value.shape_of if isinstance(value, Phantom) else value.to("meta")
        owners[id(inner)] = value
        return inner
    if isinstance(value, list | tuple):
        return type(value)(_enter(item, owners) for item in value)
    return torch.device("meta") if isinstance(value, torch.device) else value


def _leave(value: Any, owners: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return owners[id(value)] if id(value) in owners else Phantom(value)
    return type(value)(_leave(item, owners) for item in value) if isinstance(value, list | tuple) else value


def has_phantom(values: Any) -> bool:
    """Return whether there is a phantom among arguments, in lists too."""
    for value in values:
        if isinstance(value, Phantom) or (isinstance(value, list | tuple) and has_phantom(value)):
            return True
    return False


@dataclass
class Work:
    """What a stretch of computation takes.

    Attributes:
        operations: Multiplications and additions of matrix products and attention; one of each makes two.
        moved: Bytes that the operations read and write, each one's arguments and results.
        kernels: Operations that are not mere views.
        seconds: Least time on the planned hardware.
    """

    operations: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    seconds: float = 0.0


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations inside a `with` block, and the bytes of the tensors that are alive.

    Args:
        seconds_of: Returns the seconds of an operation from its number of operations, the bytes that it moves
            and the type of its products; None counts no time.
    """

    def __init__(self, seconds_of: Callable[[float, float, torch.dtype], float] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds_of = seconds_of
        self._work = Work()
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Named = None
    ) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        if has_phantom(args) or has_phantom(kwargs.values()):
            found = run_on_shapes(func, args, kwargs)
        else:
            found = func(*args, **kwargs)
        results = list(_tensors(found))
        for tensor in results:
            self.hold(tensor)
        if not is_free(func):
            self._count(func, args, kwargs, results)
        return found

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor for as long as it is alive."""
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._known:
            return
        size = self._known[key] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key).atexit = False

    def hold_all(self, module: nn.Module) -> None:
        """Count the memory of a module's parameters."""
        for parameter in module.parameters():
            self.hold(parameter)

    def _release(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def _count(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: list[Tensor]
    ) -> None:
        given = [*_tensors(args), *_tensors(list(kwargs.values()))]
        moved = float(sum(t.numel() * t.element_size() for t in [*given, *results]))
        operations = float(count_operations(func, args, results))
        self._work.operations += operations
        self._work.moved += moved
        self._work.kernels += 1
        if self.seconds_of is not None and results:
            self._work.seconds += self.seconds_of(operations, moved, results[0].dtype)

    @property
    def work(self) -> Work:
        """The work since `begin`, in a copy that later work leaves as it is."""
        return replace(self._work)

    def begin(self) -> int:
        """Let work and peak begin anew; return the bytes that are alive now."""
        self._work, self.peak = Work(), self.live
        return self.live


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _storage(tensor: Tensor) -> Any:
    return (tensor.shape_of if isinstance(tensor, Phantom) else tensor).untyped_storage()


def make_phantom(module: nn.Module) -> None:
    """Put phantoms in the place of a module's parameters, which are on the meta device; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    phantom = Phantom(parameter.detach())
                    made[id(parameter)] = nn.Parameter(phantom, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]


class Pretence(TorchFunctionMode):
    """Inside, phantoms say that they are on the planned device, and new tensors of that device are phantoms.

    Where torch has one operation for a device and several for the CPU, the device's own is taken.

    Args:
        device: Type of the planned device.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._before: list[torch.device] = []
        self.device = torch.device(device)

    def __enter__(self) -> Pretence:
        """Let phantoms be on the planned device."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._before.append(Phantom.planned)
        Phantom.planned = self.device
        return self

    def __exit__(self, *reason: Any) -> None:
        """Let them be where they were before."""
        Phantom.planned = self._before.pop()
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Named = None
    ) -> Any:
        """Answer for the planned device."""
        kwargs = dict(kwargs or {})
        if self.device.type == "cpu":
            return func(*args, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.backward:
            with self:  # backward passes ask for devices too
                _backward(*args, **kwargs)
            return None
        if _is(kwargs.get("device"), self.device):
            if not has_phantom(args):
                return Phantom(func(*args, **{**kwargs, "device": "meta"}))
            del kwargs["device"]
        if func is Tensor.to:
            args = [value for value in args if not _is(value, self.device)]
            if len(args) == 1 and not kwargs:
                return args[0]
        return OF_DEVICE.get(func, func)(*args, **kwargs)


def _is(value: Any, device: torch.device) -> bool:
    return isinstance(value, torch.device | str) and torch.device(value).type == device.type


def _backward(x: Tensor, gradient: Tensor | None = None, retain_graph: bool = False, **_: Any) -> None:
    """Do what `Tensor.backward` does for a scalar, with the modes that are active.

    The function itself would hand over to the mode, without which it would then run.
    """
    start = (torch.ones_like(x) if gradient is None else gradient,)
    engine_run_backward((x,), start, bool(retain_graph), False, (), True, accumulate_grad=True)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


# operations of the CPU and what a GPU has for them
OF_DEVICE: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}
