"""Weights in slices, one for each process of a run: `trainer=fsdp`, for full fine-tuning of large models.

Each process owns a slice of every float32 weight, and the gradient and optimizer state of that slice
(PyTorch's `fully_shard`). After each optimizer step the processes gather the weights that the network
computes with, in the precision of the computation, and keep them whole until the next step. Forward passes
exchange nothing: processes decode different prompts and stop at different steps, so that one would wait for
another in vain. Backward passes do: a layer's gradient is averaged and sliced as soon as it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from spg.models.policy import Policy
from spg.models.slices import (
    SLICES,
    WEIGHT,
    fill_from_slices,
    optimizer_name,
    write_slices,
)
from spg.models.weights import describe_checkpoint
from spg.training.slice_folders import unused_name


class Sharded(ModelParallelStrategy):
    """Lightning's strategy that slices the weights of a module's `policy`.

    Checkpoints hold whole tensors, as those of `ddp` do, or slices, which each process writes by itself.
    Either kind is read. All methods gather, and must be called by all processes, except those that load.

    Args:
        timeout: How long a process waits for the others.
        write_slices: Whether checkpoints hold slices.
    """

    # Lightning loads the weights of a checkpoint before `setup` slices them
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def __init__(self, timeout: timedelta, write_slices: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.parts: list[FSDPModule] = []
        self.writes_slices = write_slices
        self._written: tuple[int, str] | None = None  # update of the newest folder, and its name
        self._start: Path | None = None  # folder of the weights to begin with

    def setup_environment(self) -> None:
        """Join the processes to one group, all of which have a slice of every weight."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Slice the weights, make an optimizer for the slices, and gather what the network computes with."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        policy: Policy = self.lightning_module.policy
        lower = torch.bfloat16 if policy.precision == "bf16-mixed" else None
        # inputs are not cast: rotary tables stay in full precision
        numbers = MixedPrecisionPolicy(lower, torch.float32, cast_forward_inputs=False)
        mesh = self.device_mesh["data_parallel"]
        modules = [*policy.network.layers, policy.network]
        self.parts = [
            fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=numbers)
            for module in modules
        ]
        for part in self.parts:
            part.set_reshard_after_backward(False)
        register_fsdp_forward_method(policy.network, "hidden")
        self.model_to_device()
        if self._start is not None:
            fill_from_slices(self._start, self._sliced_weights())
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.gather()

    def gather(self) -> None:
        """Gather the whole weights again from their slices."""
        for part in self.parts:
            part.reshard()
            part.unshard()

    @contextmanager
    def expose_slices(self) -> Iterator[None]:
        """Let the network's parameters be the slices for the time of a `with` block, then gather them."""
        for part in self.parts:
            part.reshard()
        yield
        self.gather()

    def copy_slices(self) -> dict[str, Tensor]:
        """Return copies of this process's slices, by the names of their parameters in the module."""
        assert self.lightning_module is not None
        with self.expose_slices():
            return {n: p.detach().clone() for n, p in self.lightning_module.named_parameters()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the parameters that `tensors` names with whole tensors, or with those of `copy_slices`."""
        assert self.lightning_module is not None
        with self.expose_slices():
            for name, parameter in self.lightning_module.named_parameters():
                if name in tensors:
                    parameter.copy_(_slice_of(tensors[name], parameter))

    def fill_from_slices(self, folder: Path) -> None:
        """Fill the trained parameters from the slices of a checkpoint, each process what it holds.

        Raises:
            ValueError: if the folder is broken.
        """
        with self.expose_slices():
            fill_from_slices(folder, self._sliced_weights())

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take the optimizer step on the slices, then gather the weights again."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.gather()
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what the file of a checkpoint holds of the module: its whole tensors, or {} for slices."""
        return {} if self.writes_slices else self.whole_state_dict()

    def whole_state_dict(self) -> dict[str, Any]:
        """Return the whole tensors of the module on the CPU of the first process, {} on the others."""
        assert self.lightning_module is not None
        with self.expose_slices():
            state = self.lightning_module.state_dict()
            return self._whole(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the file of a checkpoint holds of an optimizer.

        On the first process this is the state that a single process would have, without tensors for slices.
        """
        state = (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        if self.writes_slices:
            return {**state, "state": {}}
        entries = {number: self._whole(entry) for number, entry in state["state"].items()}
        return {**state, "state": entries}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write the file of a checkpoint; before it, the folder that it names if it is to hold slices."""
        if self.writes_slices:
            checkpoint[SLICES] = self._write_slices(Path(filepath).parent)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fill the weights of the module, which are not sliced yet; slices are left to `setup`."""
        assert self.lightning_module is not None
        self._start = checkpoint.get(SLICES)
        if self._start is None:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's slices of a whole optimizer state, or of one in slices."""
        for index, (optimizer, state) in enumerate(
            zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            entries = {
                number: {name: _slice_of(value, parameters[number]) for name, value in entry.items()}
                for number, entry in state["state"].items()
            }
            if SLICES in checkpoint:
                named = {
                    optimizer_name(index, number, name): value
                    for number, entry in entries.items()
                    for name, value in entry.items()
                }
                fill_from_slices(checkpoint[SLICES], named)
            optimizer.load_state_dict({**state, "state": entries})

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; processes of a machine share its pages, which are read as they are used."""
        return describe_checkpoint(checkpoint_path)

    def _write_slices(self, folder: Path) -> str:
        """Write the slices of this update to a new folder in `folder`, once, and return its name."""
        module = self.lightning_module
        assert module is not None
        update = module.updates
        if self._written is None or self._written[0] != update:
            name = self.broadcast(unused_name(folder, update))
            with self.expose_slices():
                tensors = self._sliced_weights()
                for index, optimizer in enumerate(self.optimizers):
                    for number, entries in optimizer.state_dict()["state"].items():
                        tensors |= {optimizer_name(index, number, key): t for key, t in entries.items()}
                write_slices(folder / name, tensors)
            self._written = (update, name)
        return self._written[1]

    def _sliced_weights(self) -> dict[str, Tensor]:
        """Return the trained parameters, which must be slices now, by their names in a folder."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return {f"{WEIGHT}{name}": p.detach() for name, p in named if p.requires_grad}

    def _whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return whole tensors on the CPU of the first process, {} on the others, gathered one by one."""
        kept = {}
        for name, value in tensors.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                kept[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        return kept


def sharding_of(module: pl.LightningModule) -> Sharded | None:
    """Return the strategy that slices a module's weights; None if each process has all of them."""
    strategy = None if module._trainer is None else module.trainer.strategy
    return strategy if isinstance(strategy, Sharded) else None


def _slice_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's slice of a whole tensor [...], if `like` has its shape and is sliced.

    For a tensor without storage this is room for the slice.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
    if tensor.is_meta:
        return torch.empty_like(like, dtype=tensor.dtype)
    # a view would keep the whole tensor
    sliced = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return sliced.clone()
