"""Which checkpoint of a run is chosen, by which rule, and how a table says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spg.config import ConfigError

# the model before training, which no rule chooses
BASE = "base"
BEST = "checkpoints/best.ckpt"
# what a split is called in a sentence
SPLIT_WORDS = {"validation": "the validation half", "test": "the test half", "heldout": "both halves"}


def run_weights(run: Path, rule: str) -> list[tuple[str, Path]]:
    """Return name and path of the run's weights to evaluate.

    For `validation` these are the best checkpoint and the final weights, for `test_average` all checkpoints
    and the final weights. If there are no final weights yet, the last checkpoint stands for them.

    Args:
        run: The run's directory.
        rule: The rule that will choose among them.

    Raises:
        ConfigError: if the run has no weights.
    """
    final = [path for path in (run / "weights.safetensors", run / "adapter") if path.exists()][:1]
    # files whose name begins with `replaced` belong to what the run was before it went back
    checkpoints = [
        path for path in sorted(run.glob("checkpoints/*.ckpt")) if not path.name.startswith("replaced")
    ]
    last = [path for path in checkpoints if path.name == "last.ckpt"]
    if rule == "validation":
        paths = [path for path in checkpoints if path.name == "best.ckpt"] + (final or last)
    else:
        paths = checkpoints if last else checkpoints + final
    if not paths:
        raise ConfigError(f"run={run} holds neither checkpoints nor weights.safetensors yet")
    return [(str(path.relative_to(run)), path) for path in paths]


def select(rule: str, accuracies: Mapping[str, float]) -> str | None:
    """Return the checkpoint that a rule chooses, None if there is none to choose.

    Args:
        rule: `validation` or `test_average`.
        accuracies: The accuracy of each model.
    """
    if rule == "validation":
        return BEST if BEST in accuracies else None
    checkpoints = [model for model in accuracies if model != BASE]
    return max(checkpoints, key=lambda model: accuracies[model], default=None)


def describe_selection(rule: str, split: str) -> str:
    """Return in words what a rule chose on, if `split` was scored."""
    if rule == "test_average":
        return (
            f"chosen on the scored items themselves, {SPLIT_WORDS[split]}, by the best average, as published"
        )
    words = f"chosen on the validation half, during training; scored on {SPLIT_WORDS[split]}"
    if split == "test":
        return words
    return f"{words}: the items it was chosen on are among those scored, unless the run's were others"
