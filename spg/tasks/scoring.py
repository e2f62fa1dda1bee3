"""Score many completions, several at once if a task waits for other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from spg.core.examples import Example

Score = TypeVar("Score")


def score_all(
    function: Callable[[Example, str], Score], examples: Sequence[Example], texts: Sequence[str], workers: int
) -> list[Score]:
    """Call a task's `reward`, `measure` or `answer` for each example and its completion.

    Args:
        function: The method to call.
        examples: N examples.
        texts: Their N completions.
        workers: Number of completions to score at the same time (`Task.workers`).

    Returns:
        The N results, in the order of the examples.
    """
    if workers == 1:
        return [function(example, text) for example, text in zip(examples, texts, strict=True)]
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(function, examples, texts))
    finally:
        pool.shutdown(cancel_futures=True)  # after an interruption, do not begin those that wait
