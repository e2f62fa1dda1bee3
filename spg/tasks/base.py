"""What a task is: the one place that training and evaluation ask about data and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template

SPLITS = ("train", "validation", "test", "heldout")


class Task(Protocol):
    """A set of examples with a prompt, a reward and measures for each.

    Training learns from `reward` on the split `train`; evaluation reports `measure`. Choices are
    made on `validation`, results reported on `test`; the two are the halves of `heldout`.
    """

    name: str
    parser: str  # name of the rule that finds a completion's answer and compares it
    shots: int  # worked examples in a prompt
    workers: int  # completions that may be scored at once; above 1 where scoring waits on other processes

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of `split`, the same at every call; raises InputError where there are none."""
        ...

    def prompt(self, example: Example) -> str | Chat:
        """Return the prompt: bare text, or a chat; an assistant's last message opens the completion."""
        ...

    def template(self, example: Example) -> Template | None:
        """Return the completion with holes that the model fills in, or None for a free completion."""
        ...

    def demonstrations(self) -> Sequence[Example]:
        """Return the examples whose `target` supervised pretraining learns; mostly those of `train`."""
        ...

    def target(self, example: Example) -> str:
        """Return the completion that an example demonstrates, mostly a right one."""
        ...

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the reward's parts for a completion's text; their sum is the reward."""
        ...

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the answer that the parser finds in a completion's text, None where it finds none."""
        ...

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return `accuracy`, from 0 to 1, and what belongs beside it, for a completion's text."""
        ...

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example that a line of saved generations tells of; raises InputError where it does not.

        Our own lines hold it under `example`; those in the authors' format, `question` and `ground_truth`.
        """
        ...


def check_choices(task: str, **choices: tuple[str, Sequence[str]]) -> None:
    """Raise InputError for the first (value, allowed values) of a task's settings that is not allowed."""
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise InputError(f"task.{option}={value} is not one of those of {task}: {', '.join(allowed)}")


def check_generated(eval_size: int | None) -> None:
    """Raise InputError where held-out examples are generated, and it is not said how many."""
    if eval_size is None:
        raise InputError(
            "task.eval_size=null: examples of this task are generated, and null is no number; "
            "give how many, as task.eval_size=256"
        )


class Split:
    """Rows of which some are for training and some held out, each loaded when first asked for."""

    def __init__(self) -> None:
        self._rows: dict[str, Sequence[Example]] = {}

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of `split`; the two halves of the held-out rows are validation and test."""
        if split not in SPLITS:
            raise InputError(f"split={split!r} is unknown; allowed: {', '.join(SPLITS)}")
        source = "train" if split == "train" else "heldout"
        if source not in self._rows:
            self._rows[source] = self._load(source)
        return self._rows[source] if split == "train" else halves(self._rows[source], split)

    def _load(self, source: str) -> Sequence[Example]:
        """Return the rows of `train` or `heldout`."""
        raise NotImplementedError


def halves(rows: Sequence[Example], split: str) -> Sequence[Example]:
    """Return a split of held-out rows: every other one for each half, all for `heldout`."""
    return {"validation": rows[0::2], "test": rows[1::2], "heldout": rows}[split]
