"""What an evaluation scores: candidates that complete examples, one at a time, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spg.evaluation.evaluator import Complete, Completion, Item
from spg.evaluation.generations import read_generations
from spg.evaluation.settings import DECODING_SETTINGS, fingerprints
from spg.tasks.base import Task


def _do_nothing() -> None:
    pass


@dataclass(frozen=True)
class Candidate:
    """A model, or a file's completions of one model.

    Attributes:
        name: The name in tables and files.
        items: The items to complete.
        complete: Completes a batch of items.
        load: Prepares `complete`; called once before the first batch.
    """

    name: str
    items: Sequence[Item]
    complete: Complete
    load: Callable[[], None] = _do_nothing


@dataclass(frozen=True)
class Candidates:
    """All candidates of an evaluation.

    Attributes:
        candidates: The candidates, in the order in which they are scored.
        settings: What results.json says of decoding and model.
        made_with: Identifies the files and the device that the completions come from.
        device: Name of the device; None if nothing is computed.
        precision: Precision of the weights in words; None if nothing is computed.
        split: The split that is scored.
        shots: Number of examples in a prompt; None if that is not known.
    """

    candidates: Sequence[Candidate]
    settings: dict[str, Any]
    made_with: dict[str, Any]
    device: str | None = None
    precision: str | None = None
    split: str = "as in the file"
    shots: int | None = None


def saved_candidates(cfg: DictConfig, task: Task) -> Candidates:
    """Return the completions of the file `cfg.generations` as candidates.

    Raises:
        InputError: if the file can't be used.
    """
    settings = dict.fromkeys(DECODING_SETTINGS) | {"generations": str(cfg.generations), "run": None}
    return Candidates(
        [_from_file(name, pairs) for name, pairs in read_generations(Path(cfg.generations), task).items()],
        settings | {"eval_batch_size": cfg.eval_batch_size},
        fingerprints(cfg),
    )


def _from_file(name: str, pairs: Sequence[tuple[Item, Completion]]) -> Candidate:
    found = {(item.index, item.sample): completion for item, completion in pairs}

    def complete(items: Sequence[Item]) -> list[Completion]:
        return [found[item.index, item.sample] for item in items]

    return Candidate(name, [item for item, _ in pairs], complete)
