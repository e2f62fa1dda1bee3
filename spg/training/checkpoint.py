"""What a checkpoint of a training run holds, and which checkpoints a run accepts.

Lightning writes and reads the file. Its loops are left out: they count batches of an epoch, which mean
nothing here, since rollouts count themselves. Only trained tensors are kept, so that the checkpoint of an
adapter is small.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from spg.algorithms.objectives import Adaptive, Objective
from spg.config.renames import update_paths
from spg.core.errors import RunError
from spg.core.world import World
from spg.models.weights import describe_checkpoint, fill_weights
from spg.runs.identity import CHANGEABLE, find_difference
from spg.training.fsdp import sharding_of

FORMAT = 1


class TrainedWeights:
    """The tensors of a module that training changes, by their names in the module's state."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors themselves; if weights are sliced, as the network computes with them."""
        return {name: p for name, p in self._module.named_parameters() if p.requires_grad}

    def whole(self) -> dict[str, Tensor]:
        """Return whole tensors on the CPU; if weights are sliced, on the first process alone.

        Every process must call this.
        """
        names = self.tensors()
        sharding = sharding_of(self._module)
        if sharding is not None:
            state = sharding.whole_state_dict()
            return {name: tensor for name, tensor in state.items() if name in names}
        return {name: tensor.detach().cpu() for name, tensor in names.items()}

    def copies(self) -> dict[str, Tensor]:
        """Return copies for `load`; if weights are sliced, of this process's slices."""
        sharding = sharding_of(self._module)
        if sharding is not None:
            return sharding.copy_slices()
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the trained tensors with those of a checkpoint, or with `copies`.

        Raises:
            RunError: if they do not fit.
        """
        self.check_fit(tensors)
        sharding = sharding_of(self._module)
        if sharding is not None:
            sharding.fill(tensors)
        else:
            self._module.load_state_dict(tensors, strict=False)

    @torch.no_grad()
    def load_file(self, path: Path) -> None:
        """Fill the trained tensors with those of a checkpoint.

        Raises:
            RunError: if the file is broken, or they do not fit.
        """
        try:
            checkpoint = describe_checkpoint(path)
            self.check_fit(checkpoint["state_dict"])
            sharding = sharding_of(self._module)
            if sharding is not None and "slices" in checkpoint:
                sharding.fill_from_slices(checkpoint["slices"])
            elif sharding is not None:
                sharding.fill(checkpoint["state_dict"])
            else:
                fill_weights(checkpoint, self.tensors())
        except ValueError as error:
            raise RunError(str(error)) from error

    def with_gradients(self, optimizer: LightningOptimizer) -> list[Tensor]:
        """Return the tensors that hold gradients; if weights are sliced, the optimizer's slices."""
        if sharding_of(self._module) is None:
            return list(self.tensors().values())
        return [weight for group in optimizer.param_groups for weight in group["params"]]

    def check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise RunError if `tensors` are not those that are trained, by name and shape."""
        expected = {name: tuple(t.shape) for name, t in self.tensors().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if expected != found:
            name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise RunError(
                f"the checkpoint does not fit the model: {name} is {found.get(name, 'missing')} in it and "
                f"{expected.get(name, 'not trained')} here; give a checkpoint of this model"
            )


class ResumableModule(pl.LightningModule):
    """A module that counts its rollouts and updates, and goes on from a checkpoint as if it had not stopped.

    Args:
        identity: Settings that a checkpoint must share with the run that it is loaded into.
        objective: What it has learned travels with the checkpoint, if it is `Adaptive`.
        max_updates: Updates of the run.
    """

    def __init__(self, identity: Mapping[str, Any], objective: Objective, max_updates: int) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold only what is trained; `check_fit` compares that
        self.identity = dict(identity)
        self.objective = objective
        self.max_updates = max_updates
        self.weights = TrainedWeights(self)
        self.rollouts = 0  # rollouts done
        self.updates = 0  # optimizer steps done
        self.latest: dict[str, float] = {}  # last value of every metric
        self.seconds: dict[str, float] = {}  # spent on each part of the work
        self.started = time.perf_counter()
        self.earlier = 0.0  # seconds that the run took before it was resumed

    @property
    def world(self) -> World:
        """The processes that share the run."""
        return World() if self._trainer is None else World(self.global_rank, self.trainer.world_size)

    def elapsed(self) -> float:
        """Return the seconds that the run has taken, including those before it was resumed."""
        return self.earlier + time.perf_counter() - self.started

    def record(self, metrics: dict[str, float], update: int) -> None:
        """Log metrics as belonging to optimizer step number `update`, from 1; 0 is before training."""
        self.latest.update(metrics)
        for logger in self.loggers:
            logger.log_metrics(metrics, step=update)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and identity; keep the trained tensors, and leave Lightning's loops out."""
        del checkpoint["loops"]
        trained = self.weights.tensors()
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["spg"] = {
            "format": FORMAT,
            "rollouts": self.rollouts,
            "updates": self.updates,
            "processes": self.world.size,
            "latest": dict(self.latest),
            "seconds": dict(self.seconds),
            "elapsed": self.elapsed(),
            "identity": self.identity,
        }
        if isinstance(self.objective, Adaptive):
            checkpoint["spg"]["objective"] = self.objective.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take counters back.

        Raises:
            RunError: if the checkpoint is not one of this run.
        """
        own = checkpoint.get("spg")
        if not isinstance(own, dict) or own.get("format") != FORMAT:
            raise RunError("the checkpoint was not written by this version of spg.train; give another")
        _check_identity(update_paths(own["identity"]), update_paths(self.identity))
        self.weights.check_fit(checkpoint["state_dict"])
        if own["updates"] > self.max_updates:
            raise RunError(
                f"the checkpoint has done {own['updates']} updates already, but trainer.max_updates="
                f"{self.max_updates}; give a higher number, or an earlier checkpoint"
            )
        self.rollouts, self.updates = own["rollouts"], own["updates"]
        self.latest, self.seconds = dict(own["latest"]), dict(own["seconds"])
        self.earlier = own["elapsed"]
        if isinstance(self.objective, Adaptive):
            self.objective.restore(own.get("objective", {}))  # absent from checkpoints of version 0.3


def processes_of(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of processes that wrote a checkpoint; version 0.5 has it among the settings."""
    own = checkpoint["spg"]
    return int(own["processes"] if "processes" in own else own["identity"].get("trainer.devices", 1))


def _check_identity(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    # more settings may change now than when an older version wrote theirs
    before, now = ({k: v for k, v in side.items() if k not in CHANGEABLE} for side in (theirs, ours))
    found = find_difference(before, now)
    if found is not None:
        raise RunError(
            f"the checkpoint belongs to a run with {found[0]}, this one has {found[1]}; resume with the "
            "run's own settings, or start a new run"
        )
