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
        return tests_of_check(example["test"], example["question"], example["entry_point"])

    def runnable(self, example: Example, program: str) -> str:
        """Return the program behind the prompt's imports and helpers, or, as a body, behind the prompt."""
        if "entry_point" not in example:
            return program
        question, entry_point = example["question"], example["entry_point"]
        tree = parse_program(program)
        if tree and any(isinstance(s, ast.FunctionDef) and s.name == entry_point for s in tree.body):
            first = "".join(FUTURE.findall(program))  # allowed at the very top alone
            return first + question.rpartition(f"def {entry_point}(")[0] + FUTURE.sub("", program)
        # a body alone goes on to the first line that is the model's next idea, as in the published evaluation
        body = NEXT.split(program, maxsplit=1)[0] if INDENTED.match(program) else program
        # as it stands, with its first line stripped, or without the body's indentation
        forms = [
            form for p in (body, program) for form in (p, "    " + p.lstrip(), textwrap.indent(p, "    "))
        ]
        return next((question + form for form in forms if compiles(question + form)), question + program)


INDENTED = re.compile(r"(?:[ \t]*\n)*[ \t]+\S")
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
NEXT = re.compile(r"\n(?=def |class |if __name__|print\(|#(?!.*\n\s*[ \t]\S))")
