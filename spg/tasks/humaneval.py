"""HumanEval: functions to complete from their signature and description (Chen et al. 2021)."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from spg.core.examples import Example
from spg.tasks.coding import Coding
from spg.tasks.datasets import Published
from spg.tasks.parsing.programs import compiles, parse_program, tests_of_check

COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


class HumanEval(Coding):
    """The 164 functions of HumanEval; see `Coding` for the parameters.

    A completion may give the whole function, or only its body, as in the data set.
    """

    name = "humaneval"
    heldout = Published("openai/openai_humaneval", "test", COLUMNS)

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the example of a row."""
        return {
            "task_id": row["task_id"],
            "question": row["prompt"],
            "solution": row["prompt"] + row["canonical_solution"],
            "test": row["test"],
            "entry_point": row["entry_point"],
        }

    def tests(self, example: Example) -> list[str]:
        """Return the tests of `check`, one for each assertion."""
        if "entry_point" not in example:
            return super().tests(example)
        return tests_of_check(example["test"], example["question"], example["entry_point"])

    def runnable(self, example: Example, program: str) -> str:
        """Return the program after the imports and helpers of the prompt; a body goes after the prompt."""
        if "entry_point" not in example:
            return program
        question, entry_point = example["question"], example["entry_point"]
        tree = parse_program(program)
        if tree and any(isinstance(s, ast.FunctionDef) and s.name == entry_point for s in tree.body):
            first = "".join(FUTURE.findall(program))  # allowed only at the very top
            return first + question.rpartition(f"def {entry_point}(")[0] + FUTURE.sub("", program)
        # a body ends at the first line of something new, as in the published evaluation
        body = NEXT.split(program, maxsplit=1)[0] if INDENTED.match(program) else program
        # as it is, with its first line stripped, or without the indentation of a body
        forms = [
            form for p in (body, program) for form in (p, "    " + p.lstrip(), textwrap.indent(p, "    "))
        ]
        return next((question + form for form in forms if compiles(question + form)), question + program)


INDENTED = re.compile(r"(?:[ \t]*\n)*[ \t]+\S")
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
NEXT = re.compile(r"\n(?=def |class |if __name__|print\(|#(?!.*\n\s*[ \t]\S))")
