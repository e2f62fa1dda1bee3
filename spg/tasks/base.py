"""What a task is: the one place that training and evaluation ask about data and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge, Interval

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.rules import Words

SPLITS = ("train", "validation", "test", "heldout")

# rules of parameters that several tasks have
Shots = Annotated[int, Interval(ge=0, le=3)]
PromptStyle = Literal["bare", "instruct"]
GeneratedSize = Annotated[
    int, Ge(1), Words("a whole number, 1 or more (not null: examples of this task are generated)")
]


class Task(Protocol):
    """A set of examples, with a prompt, a reward and measures for each.

    Training learns from `reward` on the split `train`, and evaluation reports `measure`. Choices such as
    the best checkpoint are made on `validation`, and results are reported on `test`; these two are the
    halves of `heldout`.

    An example is a mapping of whatever the task needs; nobody else looks inside. `BaseTask` has defaults for
    most of this protocol, so derive from it unless you have a reason not to.

    Attributes:
        name: Name of the task in figures, tables and messages.
        parser: Name of the rule that finds the answer in a completion and compares it.
        shots: Number of worked examples in a prompt.
        workers: Number of completions that may be scored at the same time. Above 1 only if scoring waits for
            other processes; `reward` and `measure` are then called from several threads.
    """

    name: str
    parser: str
    shots: int
    workers: int

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split, the same ones in every call.

        Raises:
            InputError: if the split is unknown or its data cannot be read.
        """
        ...

    def prompt(self, example: Example) -> str | Chat:
        """Return the prompt: a text, or a chat; a last message of the assistant opens the completion."""
        ...

    def template(self, example: Example) -> Template | None:
        """Return a completion with holes for the model to fill in, or None for a free completion."""
        ...

    def demonstrations(self) -> Sequence[Example]:
        """Return the examples whose `target` supervised pretraining learns."""
        ...

    def target(self, example: Example) -> str:
        """Return the completion that an example demonstrates, usually a right one."""
        ...

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the parts of the reward of a completion by name; their sum is the reward."""
        ...

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the answer that the parser finds in a completion, or None if it finds none."""
        ...

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return `accuracy`, from 0 to 1, and any other measures of a completion by name."""
        ...

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example of a saved completion.

        Args:
            record: A line of a file of generations. Lines of this project hold the example under `example`.
                Lines in the format of the authors hold `question` and `ground_truth`.

        Raises:
            InputError: if the line holds no example of this task.
        """
        ...


class BaseTask:
    """Defaults that most tasks share. Your own task adds `name`, `prompt`, `reward`, `measure` and its data.

    Give the data with `load_rows` (training rows and held-out rows, each loaded once), or override
    `examples`. `target` is only needed to make base weights by supervised pretraining.
    """

    name: str
    parser = "exact"
    shots = 0
    workers = 1

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split; validation and test are the two halves of the held-out rows."""
        check_split(split)
        source = "train" if split == "train" else "heldout"
        loaded: dict[str, Sequence[Example]] = self.__dict__.setdefault("_loaded", {})
        if source not in loaded:
            loaded[source] = self.load_rows(source)
        return loaded[source] if split == "train" else select_half(loaded[source], split)

    def load_rows(self, source: str) -> Sequence[Example]:
        """Return the rows of `train` or of `heldout`; called once for each of them."""
        raise NotImplementedError(f"{type(self).__name__} needs load_rows or its own examples")

    def template(self, example: Example) -> Template | None:
        """Return None: completions are free."""
        return None

    def demonstrations(self) -> Sequence[Example]:
        """Return the training examples."""
        return self.examples("train")

    def target(self, example: Example) -> str:
        """Return the completion that an example demonstrates; a task without one cannot be pretrained on."""
        raise InputError(
            f"the task {self.name} has no target completions to learn from; give a model with weights, or "
            f"define {type(self).__name__}.target"
        )

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the completion without white space around it, or None if nothing is left."""
        return completion.strip() or None

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the `example` of a saved completion.

        Raises:
            InputError: if the line has none.
        """
        example = record.get("example")
        if not isinstance(example, Mapping):
            found = ", ".join(map(str, record))
            raise InputError(f"a saved completion of {self.name} needs `example`; the line has {found}")
        return example


def check_split(split: str) -> None:
    """Raise InputError if there is no split of this name."""
    if split not in SPLITS:
        raise InputError(f"split={split!r} is unknown; allowed: {', '.join(SPLITS)}")


def select_half(rows: Sequence[Example], split: str) -> Sequence[Example]:
    """Return the held-out rows of a split: every other row for each half, all of them for `heldout`."""
    return {"validation": rows[0::2], "test": rows[1::2], "heldout": rows}[split]
