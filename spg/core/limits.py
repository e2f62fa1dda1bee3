"""One rule for each number a user can set, checked by the configuration and by constructors.

This module knows nothing but numbers, so that a bad value is refused before torch is imported.
A parameter has one meaning and one name throughout the project, hence one entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """What a value may be, in a test and in words."""

    allows: Callable[[Any], bool]
    words: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least(low: int) -> Limit:
    return Limit(lambda v: _is_int(v) and v >= low, f"a whole number, {low} or more")


def _between(low: float, high: float) -> Limit:
    words = f"a number from {low:g} to {high:g}"
    return Limit(lambda v: _is_number(v) and low <= v <= high, words)


def _one_of(*options: Any) -> Limit:
    listed = ", ".join(str(option) for option in options)
    return Limit(lambda v: any(v is o or v == o for o in options), f"one of: {listed}")


def _or_null(limit: Limit) -> Limit:
    return Limit(lambda v: v is None or limit.allows(v), f"{limit.words}, or null")


POSITIVE = Limit(lambda v: _is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = Limit(lambda v: _is_number(v) and v >= 0, "a number, 0 or more")
COUNT = _at_least(1)
COUNT_OR_ZERO = _at_least(0)
PROBABILITY = _between(0, 1)
FLAG = Limit(lambda v: isinstance(v, bool), "true or false")


def _is_pair_of_decays(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and len(value) == 2 and all(_is_number(v) and 0 <= v < 1 for v in value)
    )


LIMITS: dict[str, Limit] = {
    # the paper's symbols
    "beta": POSITIVE,
    "omega": Limit(lambda v: v == "auto" or PROBABILITY.allows(v), f"{PROBABILITY.words}, or auto"),
    "block_size": COUNT,
    "num_mc": COUNT,
    "mu": COUNT,
    "group_size": _at_least(2),
    "seed": Limit(lambda v: _is_int(v) and 0 <= v < 2**31, "a whole number from 0 to 2147483647"),
    # masking
    "prompt_mask_prob": PROBABILITY,
    "block_choice": _one_of("released", "uniform"),
    "scored_positions": _one_of("masked", "block"),
    "region": _one_of("to_eos", "all"),
    "draws": _one_of("independent", "antithetic", "stratified", "complementary"),
    # estimators and objective
    "normalization": _one_of("per_token", "elbo_weight"),
    "smoothing": Limit(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "loss_norm": _one_of("group", "batch"),
    "length_weighting": FLAG,
    "kl_coef": NOT_NEGATIVE,
    "kl_estimator": _one_of("k1", "k2", "k3"),
    "kl_to": _one_of("reference", "old"),
    "kl_average": _one_of("same", "sum"),
    "epsilon": Limit(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "epsilon_high": _or_null(NOT_NEGATIVE),
    "ratio": _one_of("token", "step"),
    "average": _one_of("tokens", "draws", "sum"),
    "positive_only": FLAG,
    "dpo_beta": POSITIVE,
    "sft_coef": NOT_NEGATIVE,
    # decoding
    "gen_length": COUNT,
    "steps": COUNT,
    "temperature": NOT_NEGATIVE,
    "remasking": _one_of("low_confidence", "random", "margin", "entropy"),
    "near_tie": _or_null(NOT_NEGATIVE),
    "stop_at_eos": FLAG,
    "cache": _one_of("none", "prefix", "dual"),
    "refresh_every": _or_null(COUNT),
    # adapters
    "r": COUNT,
    "alpha": POSITIVE,
    "dropout": Limit(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "targets": _one_of("released", "all"),
    # optimisation and budget
    "lr": POSITIVE,
    "betas": Limit(_is_pair_of_decays, "two numbers from 0 to below 1, as [0.9,0.99]"),
    "weight_decay": NOT_NEGATIVE,
    "warmup_updates": COUNT_OR_ZERO,
    "max_grad_norm": POSITIVE,
    "eps": POSITIVE,
    "prompts_per_rollout": COUNT,
    "micro_batch_size": _or_null(COUNT),
    "cut_completions": FLAG,
    "max_updates": COUNT,
    "threads": COUNT,
    "accelerator": _one_of("cpu", "cuda", "auto"),
    "strategy": _one_of("auto", "ddp", "fsdp"),
    "devices": COUNT,
    "keep_every": _or_null(COUNT),
    "precision": _one_of("32-true", "bf16-mixed"),
    # evaluation, checkpoints, logging
    "batch_size": COUNT,
    "eval_batch_size": COUNT,
    "validate_every": COUNT,
    "window": COUNT,
    "checkpoint_every": COUNT,
    "samples_every": COUNT_OR_ZERO,
    "split": _one_of("auto", "validation", "test", "heldout"),
    "samples": COUNT,
    "prompts": COUNT,
    "select": _one_of("validation", "test_average"),
    # export
    "merge": FLAG,
    "cast": _one_of("keep", "float32", "bfloat16"),
    "shard_mb": COUNT,
    "unquantized": FLAG,
    # tasks
    "format": _one_of("template", "completion"),
    "reward": _one_of("intended", "released", "rules"),
    "parser": _or_null(_one_of("d1", "spg", "math_verify", "exact", "fenced")),
    "prompt_style": _one_of("bare", "instruct"),
    "shots": Limit(lambda v: _is_int(v) and 0 <= v <= 3, "a whole number from 0 to 3"),
    "right_share": PROBABILITY,
    "numbers": Limit(lambda v: _is_int(v) and 3 <= v <= 4, "3 or 4"),
    "operations": Limit(
        lambda v: isinstance(v, str) and bool(v) and set(v) <= set("+-*/"), 'some of + - * /, as "+-*"'
    ),
    "max_number": COUNT,
    "max_target": COUNT,
    "min_empty": Limit(lambda v: _is_int(v) and 1 <= v <= 12, "a whole number from 1 to 12"),
    "max_empty": Limit(lambda v: _is_int(v) and 1 <= v <= 12, "a whole number from 1 to 12"),
    "train_size": COUNT,
    "eval_size": _or_null(COUNT),  # null only where rows come from files
    "data_seed": COUNT_OR_ZERO,
    "isolation": _one_of("auto", "user_id", "none"),
    "wall_seconds": POSITIVE,
    "memory_mb": COUNT,
    "workers": COUNT_OR_ZERO,
    # models
    "d_model": COUNT,
    "n_layers": COUNT,
    "n_heads": COUNT,
    "n_kv_heads": COUNT,
    "mlp_hidden_size": COUNT,
    "vocab_size": COUNT,
    "embedding_size": COUNT,
    "rope_theta": POSITIVE,
    "rms_norm_eps": POSITIVE,
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "head_dim": COUNT,
    "intermediate_size": COUNT,
    "tie_word_embeddings": FLAG,
    "dtype": _one_of("float32", "bfloat16"),
    "quantization": _or_null(_one_of("nf4")),
    "checkpointing": FLAG,
    "compile": FLAG,
}


def check_limits(**values: Any) -> None:
    """Raise ValueError, naming value and limit, for the first of `values` outside its limit."""
    for name, value in values.items():
        if not LIMITS[name].allows(value):
            raise ValueError(f"{name}={value!r} is out of range; allowed: {LIMITS[name].words}")
