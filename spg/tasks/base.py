"""What a task is: the one place that training and evaluation ask about data and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Example = Mapping[str, Any]
Chat = list[dict[str, str]]
# A completion with holes: texts are given, a number stands for that many tokens to be decoded.
Template = tuple[str | int, ...]

SPLITS = ("train", "validation", "test")


class Task(Protocol):
    """A set of examples with a prompt, a reward and measures for each.

    Training learns from `reward` on the split `train`; evaluation reports `measure`. Choices are
    made on `validation`, results reported on `test`; the two share no solution with `train`.
    """

    name: str

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of `split`, the same at every call."""
        ...

    def prompt(self, example: Example) -> str | Chat:
        """Return the prompt: bare text, or a chat for an instruction-tuned model."""
        ...

    def template(self, example: Example) -> Template | None:
        """Return the completion with holes that the model fills in, or None for a free completion."""
        ...

    def target(self, example: Example) -> str:
        """Return a right completion, from a solver, for supervised pretraining."""
        ...

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the reward's parts for a completion's text; their sum is the reward."""
        ...

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return `accuracy`, from 0 to 1, and what belongs beside it, for a completion's text."""
        ...
