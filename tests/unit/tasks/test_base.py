"""The base class of tasks: what a task of its own gets without writing it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from spg.core.errors import InputError
from spg.core.examples import Example
from spg.tasks.base import BaseTask, Task


class Echo(BaseTask):
    """Repeat a word."""

    name = "echo"

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_rows(self, source: str) -> Sequence[Example]:
        self.loaded.append(source)
        return [{"word": f"{source}{n}"} for n in range(5)]

    def prompt(self, example: Example) -> str:
        return f"{example['word']}="

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        return {"echo": float(completion == example["word"])}

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        return {"accuracy": float(self.answer(example, completion) == example["word"])}


def test_prompt_reward_measure_and_rows_make_a_task() -> None:
    task: Task = Echo()
    assert (task.parser, task.shots, task.workers) == ("exact", 0, 1)
    assert task.template({"word": "a"}) is None
    assert task.answer({"word": "a"}, " a\n") == "a"
    assert task.answer({"word": "a"}, " \n") is None
    assert task.example_of({"example": {"word": "a"}}) == {"word": "a"}
    assert task.demonstrations() == task.examples("train")


def test_rows_are_loaded_once_and_halved() -> None:
    task = Echo()
    halves = {split: [row["word"] for row in task.examples(split)] for split in ("validation", "test")}
    assert halves == {"validation": ["heldout0", "heldout2", "heldout4"], "test": ["heldout1", "heldout3"]}
    assert len(task.examples("heldout")) == len(task.examples("train")) == 5
    assert task.examples("train") is task.examples("train")
    assert task.loaded == ["heldout", "train"]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="split='dev' is unknown; allowed: train"):
        Echo().examples("dev")
    with pytest.raises(InputError, match=r"echo needs `example`; the line has question"):
        Echo().example_of({"question": "?"})
    with pytest.raises(InputError, match=r"echo has no target completions .* Echo\.target"):
        Echo().target({"word": "a"})
    with pytest.raises(NotImplementedError, match="BaseTask needs load_rows"):
        BaseTask().examples("train")
