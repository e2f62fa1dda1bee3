"""Settings that are not a part's parameters: their rules, one class for each place in the configuration.

What a `_target_` names has its rules in its own class (`spg.config.parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Predicate

from spg.core.rules import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Seed,
    Words,
    checked,
)

GroupSize = Annotated[int, Ge(2)]


def _are_decays(values: Sequence[Any]) -> bool:
    return len(values) == 2 and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 for value in values
    )


Decays = Annotated[
    Sequence[float], Predicate(_are_decays), Words("two numbers from 0 to below 1, as [0.9,0.99]")
]
Accelerator = Literal["cpu", "cuda", "auto"]


class Run:
    """Root keys that the training loop itself reads."""

    mu: Count
    group_size: GroupSize
    seed: Seed


class Machine:
    """Root keys of commands that compute without a trainer."""

    threads: Count
    accelerator: Accelerator
    eval_batch_size: Count
    temperature: NotNegative
    samples: Count


class Evaluation:
    """Root keys of `spg.evaluate`."""

    split: Literal["auto", "validation", "test", "heldout"]
    select: Literal["validation", "test_average"]


class Pairs:
    """Root keys of `spg.pairs`."""

    prompts: Count


class Export:
    """Root keys of `spg.export`."""

    merge: bool
    cast: Literal["keep", "float32", "bfloat16"]
    shard_mb: Count
    unquantized: bool


class Planning:
    """Root keys of `spg.plan`."""

    prompt_tokens: Count | None


class Figures:
    """Root keys of `spg.figures`."""

    window: Count


@checked
@dataclass(frozen=True)
class Optimization:
    """Numbers of the optimizer: AdamW, linear warm-up, then a constant learning rate.

    Attributes:
        lr: Learning rate after the warm-up.
        betas: Decay rates of the two moments.
        weight_decay: Decay of matrices.
        warmup_updates: Updates of linear warm-up.
        max_grad_norm: Norm to which gradients are clipped.

    Raises:
        ValueError: if a number is out of range.
    """

    lr: Positive
    betas: Decays = (0.9, 0.99)
    weight_decay: NotNegative = 0.1
    warmup_updates: CountOrZero = 10
    max_grad_norm: Positive = 0.2


class Trainer:
    """How long a run is, how its work is divided, and how often it reports: `trainer.*`."""

    accelerator: Accelerator
    strategy: Literal["auto", "ddp", "fsdp"]
    nodes: Count
    devices: Count
    threads: Count
    max_updates: Count
    prompts_per_rollout: Count
    micro_batch_size: Count | None
    cut_completions: bool
    eval_batch_size: Count
    validate_every: Count
    checkpoint_every: Count
    keep_every: Count | None
    checkpoint_format: Literal["whole", "sharded"]
    samples_every: CountOrZero
    requeue: bool


class Model:
    """What holds for a model beside its network and tokenizer: `model.*`."""

    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["nf4"] | None
    precision: Literal["32-true", "bf16-mixed"]
    checkpointing: bool
    compile: bool
    prompt_style: Literal["bare", "instruct"]


class Pretraining:
    """Supervised training of a base model: `pretrain.*`."""

    steps: Count
    batch_size: Count
    lr: Positive
    seed: Seed


# by the dotted key of the node that holds the settings; a root key means the same in every command
NODES: Mapping[str, tuple[type, ...]] = {
    "": (Run, Machine, Evaluation, Pairs, Export, Planning, Figures),
    "trainer": (Trainer,),
    "optimizer": (Optimization,),
    "model": (Model,),
    "pretrain": (Pretraining,),
}
