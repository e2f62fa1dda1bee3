"""The evaluator: completes examples in batches and measures the completions.

Training validates and tests with it, and `python -m spg.evaluate` scores models and saved completions with
it. This module needs no torch, since saved completions are scored without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spg.core.examples import Chat, Example
from spg.core.statistics import Interval, interval_of_mean
from spg.tasks.base import Task
from spg.tasks.scoring import score_all

if TYPE_CHECKING:
    from spg.core.world import World


@dataclass(frozen=True)
class Item:
    """One completion to make.

    Attributes:
        index: Number of the example.
        sample: Number of the completion among those of the example.
        example: The example.
    """

    index: int
    sample: int
    example: Example


@dataclass(frozen=True)
class Completion:
    """The completion of an item, and how it was made; None if that is not known.

    Attributes:
        prompt: The prompt.
        text: The completion.
        tokens: Number of tokens up to the first EOS, which counts.
        decoded: Number of tokens that the model chose.
        steps: Number of decoding steps.
        near_ties: Number of greedy choices that another batch size may turn.
    """

    prompt: str | Chat | None
    text: str
    tokens: int | None = None
    decoded: int | None = None
    steps: int | None = None
    near_ties: int | None = None


# completes a batch of items
Complete = Callable[[Sequence[Item]], list[Completion]]


@dataclass(frozen=True)
class Result:
    """An item, its completion, and what the task measures of it."""

    item: Item
    completion: Completion
    measures: dict[str, float]


@dataclass(frozen=True)
class Evaluator:
    """Completes items in batches and measures the completions.

    Attributes:
        complete: Completes a batch.
        task: Measures a completion.
        batch_size: Number of items in a batch.
    """

    complete: Complete
    task: Task
    batch_size: int

    def batches(
        self, items: Sequence[Item], wanted: Callable[[Item], bool] = lambda item: True
    ) -> Iterator[list[Result]]:
        """Yield the results of each batch.

        A batch of which only some items are wanted is completed as a whole, since the other items of a batch
        may change the last digits of an item. Only the wanted ones are measured.

        Args:
            items: All items. Their order decides which are in a batch together.
            wanted: Returns whether an item is still to be done.

        Yields:
            Results of the wanted items; batches without any are left out.
        """
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            if not any(map(wanted, batch)):
                continue
            pairs = zip(batch, self.complete(batch), strict=True)
            kept = [(item, completion) for item, completion in pairs if wanted(item)]
            examples = [item.example for item, _ in kept]
            texts = [completion.text for _, completion in kept]
            measures = score_all(self.task.measure, examples, texts, self.task.workers)
            yield [Result(*pair, measured) for pair, measured in zip(kept, measures, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """The results of n examples, one completion each.

    Attributes:
        measures: Values of each measure [n].
        texts: The n completions.
        examples: The n examples.
    """

    measures: Mapping[str, np.ndarray]
    texts: tuple[str, ...]
    examples: tuple[Example, ...]

    def mean(self, name: str) -> float:
        """Return the mean of a measure over the examples."""
        return float(self.measures[name].mean())

    def interval(self, name: str) -> Interval:
        """Return the 95% interval of a measure's mean."""
        return interval_of_mean([[value] for value in self.measures[name].tolist()])


def evaluate(
    complete: Complete, task: Task, examples: Sequence[Example], batch_size: int, world: World | None = None
) -> Evaluation:
    """Complete each example once and measure the completions.

    Args:
        complete: Completes a batch.
        task: Measures a completion.
        examples: The n examples.
        batch_size: Number of examples in a batch.
        world: The processes that share the examples. Each of them gets the results of all.

    Returns:
        The results, in the order of the examples.
    """
    own = range(len(examples)) if world is None else world.stretch(len(examples))
    items = [Item(index, 0, examples[index]) for index in own]
    rows = [
        (result.completion.text, result.measures)
        for batch in Evaluator(complete, task, batch_size).batches(items)
        for result in batch
    ]
    rows = rows if world is None else world.gather_items(rows)
    measures = {name: np.array([row[name] for _, row in rows]) for name in rows[0][1]}
    return Evaluation(measures, tuple(text for text, _ in rows), tuple(examples))
