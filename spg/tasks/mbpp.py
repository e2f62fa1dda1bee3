"""MBPP: short programs from a sentence and the assertions that they must meet (Austin et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spg.core.errors import InputError
from spg.core.examples import Example
from spg.tasks.coding import Coding
from spg.tasks.datasets import Published
from spg.tasks.parsing.programs import imports_for

COLUMNS = ("task_id", "text", "code", "test_list")


class MBPP(Coding):
    """The 500 test problems of MBPP; see `Coding` for the parameters.

    The prompt shows the assertions, since only they say how the function is called.
    """

    name = "mbpp"
    heldout = Published("google-research-datasets/mbpp", "test", COLUMNS, "full")

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the example of a row; raise InputError if it has no list of assertions."""
        tests = row["test_list"]
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
            raise InputError(
                f"mbpp, task_id {row['task_id']}: test_list must be a list of assertions, not {tests!r}; "
                "give the rows as json, jsonl or parquet"
            )
        return {
            "task_id": row["task_id"],
            "question": f"{row['text']}\n\nThe program must meet:\n" + "\n".join(tests),
            "solution": row["code"],
            "test_list": tests,
            "test_setup_code": row.get("test_setup_code") or "",
        }

    def tests(self, example: Example) -> list[str]:
        """Return the assertions, each as a test with the imports that it needs."""
        if "test_list" not in example:
            return super().tests(example)
        texts = [f"{example['test_setup_code']}\n{test}\n" for test in example["test_list"]]
        return [f"{imports_for(text, example['solution'])}\n{text}" for text in texts]
