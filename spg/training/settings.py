"""What the configuration group `trainer` sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from spg.core.rules import Count, CountOrZero, checked


@checked
@dataclass(frozen=True)
class TrainerSettings:
    """How long a run trains, on what, and what it does between updates.

    Attributes:
        accelerator: Device; `auto` for CUDA if there is one.
        strategy: How several processes share the work.
        devices: Number of processes on each node.
        threads: CPU threads; sums differ in the last digits between numbers of threads.
        max_updates: Optimizer steps.
        prompts_per_rollout: Prompts of a rollout, over all processes.
        validate_every: Updates between two evaluations of the validation half.
        checkpoint_every: Updates between two checkpoints.
        samples_every: Updates between two logs of sample completions; 0 for never.
        eval_batch_size: Completions decoded together in an evaluation.
        micro_batch_size: Masked sequences in one forward pass; None for all.
        cut_completions: Whether updates leave out masked positions after the longest completion.
        keep_every: Updates between two checkpoints that are kept; None for none.
        nodes: Number of machines.
        checkpoint_format: Whether a checkpoint holds whole tensors, or each process writes its slices.
    """

    accelerator: Literal["cpu", "cuda", "auto"]
    strategy: Literal["auto", "ddp", "fsdp"]
    devices: Count
    threads: Count
    max_updates: Count
    prompts_per_rollout: Count
    validate_every: Count
    checkpoint_every: Count
    samples_every: CountOrZero
    eval_batch_size: Count
    micro_batch_size: Count | None = None
    cut_completions: bool = False
    keep_every: Count | None = None
    nodes: Count = 1
    checkpoint_format: Literal["whole", "sharded"] = "whole"

    @classmethod
    def of(cls, node: Mapping[Any, Any]) -> Self:
        """Return the settings of a configuration; runs of earlier versions lack some, or have others."""
        known = {field.name for field in fields(cls)}
        return cls(**{str(name): value for name, value in node.items() if name in known})
