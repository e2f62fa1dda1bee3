"""Small runs on the CPU or on the pretended device, and what their parts ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig

from spg import config
from spg.rollout.decoder import Decoder
from spg.training.assembly import build_module
from spg.training.module import Training
from spg.training.run import Rollouts
from tests.fake.tensors import Counts, counting, pretending

# of a completion
BLOCKS, STEPS = 2, 8
# two prompts of different length, with two completions each; two updates
SMALL = (
    "task=countdown",
    "task.train_size=8",
    "task.eval_size=8",
    "model.weights=random",
    "model.network.config.d_model=32",
    "model.network.config.n_layers=2",
    "model.network.config.n_heads=2",
    "model.network.config.mlp_hidden_size=48",
    "gen_length=16",
    "block_size=8",
    "decoding.steps=8",
    "trainer.prompts_per_rollout=2",
    "trainer.max_updates=2",
    "trainer.validate_every=2",
    "group_size=2",
    "mu=2",
)
# rewards that differ within a group, so that every completion is learned from
REWARDS = "spg.tasks.countdown.Countdown.reward"


def compose(*overrides: str) -> DictConfig:
    """Return the configuration of a small run."""
    return config.compose("config", [*SMALL, *overrides])


@dataclass
class Sections:
    """What each call of a part asked of the device, by the name of the part."""

    calls: dict[str, list[Counts]] = field(default_factory=dict)

    def waits(self, name: str) -> list[dict[str, int]]:
        """Return the waits of each call."""
        return [dict(counts.waits) for counts in self.calls.get(name, [])]


PARTS: dict[str, tuple[type, str]] = {
    "rollout": (Training, "collect"),
    "step": (Decoder, "_step"),
    "preparation": (Training, "prepare_batches"),
    "update": (Training, "update"),
    "evaluation": (Training, "evaluate"),
}


@contextmanager
def sections() -> Iterator[Sections]:
    """Count what each call of a part asks of the device."""
    found = Sections()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with counting() as counts:
                result = original(*args, **kwargs)
            found.calls.setdefault(name, []).append(counts)
            return result

        return call

    with ExitStack() as stack:
        for name, (owner, method) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, method, counted(name, getattr(owner, method))))
        yield found


def _reward(self: Any, example: Any, completion: str) -> dict[str, float]:
    return {"own": sum(map(ord, completion)) % 97 / 97, "other": float(len(completion) % 5)}


@dataclass
class Learned:
    """A small run that has ended."""

    module: Training
    sections: Sections
    metrics: list[dict[str, float]]

    def weights(self) -> torch.Tensor:
        """Return what was trained, on the CPU."""
        return torch.cat([tensor.flatten().cpu() for tensor in self.module.weights.tensors().values()])


def learn(cfg: DictConfig, *, pretend: bool, change: Callable[[Training], None] | None = None) -> Learned:
    """Train as configured, without evaluation, on the pretended device or on the CPU."""
    metrics: list[dict[str, float]] = []

    def record(self: Training, found: dict[str, float], update: int) -> None:
        metrics.append({"number": update, **found})

    with (
        pretending() if pretend else nullcontext(),
        sections() as found,
        mock.patch(REWARDS, _reward),
        mock.patch.object(Training, "record", record),
    ):
        module = build_module(cfg)
        if change is not None:
            change(module)
        trainer = pl.Trainer(
            accelerator="cuda" if pretend else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Rollouts(module))
    return Learned(module, found, metrics)
