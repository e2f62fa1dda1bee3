"""HumanEval: functions to complete from their signature and description (Chen et al. 2021)."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Mapping
from typing import Any

from spg.tasks.base import Example
from spg.tasks.code import Coding, check_tests, parsed
from spg.tasks.rows import Published

COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


class HumanEval(Coding):
    """HumanEval's 164 functions; see `Coding` for the settings.

    A completion may give the whole function or, as the data set's own form is, only its body.
    """

    name = "humaneval"
    heldout = Published("openai/openai_humaneval", "test", COLUMNS)

    def example(self, row: Mapping[str, Any]) -> Example:
        return {
            "task_id": row["task_id"],
            "question": row["prompt"],
            "solution": row["prompt"] + row["canonical_solution"],
            "test": row["test"],
            "entry_point": row["entry_point"],
        }

    def tests(self, example: Example) -> list[str]:
        if "entry_point" not in example:
            return super().tests(example)
        return check_tests(example["test"], example["question"], example["entry_point"])

    def runnable(self, example: Example, program: str) -> str:
        """Return the program behind the prompt's imports and helpers, or, as a body, behind the prompt."""
        if "entry_point" not in example:
            return program
        question, entry_point = example["question"], example["entry_point"]
        tree = parsed(program)
        if tree and any(isinstance(s, ast.FunctionDef) and s.name == entry_point for s in tree.body):
            return question.rpartition(f"def {entry_point}(")[0] + program
        # as it stands, with its first line stripped, or without the body's indentation
        forms = (program, "    " + program.lstrip(), textwrap.indent(program, "    "))
        return next((question + form for form in forms if _compiles(question + form)), question + program)


def _compiles(program: str) -> bool:
    # unlike ast.parse, this refuses a `return` outside of a function
    try:
        compile(program, "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
