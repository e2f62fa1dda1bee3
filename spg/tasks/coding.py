"""What the coding tasks share: data, prompts, rewards, and the run of a program against its tests.

Each test is a text of its own that imports the program as `solution`, so that a failing test hides no other
one. What a test needs besides the function under test comes from the data set, never from the program.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

from spg.core.errors import InputError
from spg.core.examples import Chat, Example
from spg.core.rules import Count, CountOrZero, Positive, checked
from spg.sandbox.host import Cage, Outcome
from spg.tasks.base import BaseTask
from spg.tasks.datasets import Published, check_place, load
from spg.tasks.parsing.programs import (
    answer_part,
    find_program,
    imported_names,
    is_blocked,
    parse_program,
    pytest_tests,
    python_block,
    signatures,
)
from spg.tasks.parsing.tags import CLOSE, OPEN
from spg.tasks.prompts import PromptFile, instruct

log = logging.getLogger(__name__)

KODCODE = Published("KodCode/KodCode-Light-RL-10K", "train", ("question", "solution", "test"))


class Coding(BaseTask):
    """Programs on demand, judged by unit tests in a cage. A subclass names the held-out data.

    Training uses KodCode-Light-RL-10K. The reward has two parts (paper, G.1). `format` is 0.5 if the
    program stands in a ```python block inside the answer tags. `tests` is the fraction of unit tests that
    pass. Both are 0 without such a block anywhere. A program of more than `LONGEST` characters does not
    count as Python.

    Args:
        reward: `intended` pays for the format only if the program is Python. `released` pays nothing for a
            program that imports a module of `BLOCKED`: the paper describes it, but its code is not public.
            `intended` has no such list, since the cage protects.
        parser: `fenced`, the only one.
        path: File or folder with held-out rows; None loads them from the hub.
        train_path: File or folder with rows of KodCode; None loads them from the hub.
        prompt_file: File with the prompts of another code base, with {question}.
        isolation: Isolation of the cage; see `spg.sandbox.host.Cage`.
        wall_seconds: Seconds for all tests of a program.
        memory_mb: Memory of each process of a program.
        workers: Number of programs to run at the same time; 0 is one for each CPU.
        eval_size: Number of held-out rows of each half that are used; None uses all.

    Raises:
        ValueError: for values that are not allowed.
    """

    # for the configuration check: see spg.config.parts
    files = (("path",), ("train_path",), ("prompt_file",))
    name: str
    heldout: Published

    @checked
    def __init__(
        self,
        reward: Literal["intended", "released"] = "intended",
        parser: Literal["fenced"] = "fenced",
        path: str | None = None,
        train_path: str | None = None,
        prompt_file: str | None = None,
        isolation: Literal["auto", "user_id", "none"] = "auto",
        wall_seconds: Positive = 8.0,
        memory_mb: Count = 1024,
        workers: CountOrZero = 0,
        eval_size: Count | None = None,
    ) -> None:
        self.reward_name = reward
        self.parser = parser
        self.paths = {"train": train_path, "heldout": path}
        self.eval_size = eval_size
        self.prompts = None if prompt_file is None else PromptFile(prompt_file, ("question",))
        self.workers = workers or os.cpu_count() or 1
        self._new_cage = partial(
            Cage,
            isolation=isolation,
            wall_seconds=wall_seconds,
            memory_mb=memory_mb,
            workers=self.workers,
        )
        self._cage: Cage | None = None
        # reward and measure need the same run
        self._run = lru_cache(maxsize=4096)(self._run_anew)

    def load_rows(self, source: str) -> Sequence[Example]:
        """Return the rows of `train` or `heldout` that have tests."""
        published = KODCODE if source == "train" else self.heldout
        option = "task.train_path" if source == "train" else "task.path"
        if self.paths["heldout"] is not None:
            check_place(self.paths["heldout"], "task.path")
        rows = load(published, self.paths[source], option)
        if source == "heldout" and self.eval_size is not None:
            rows = rows[: 2 * self.eval_size]
        examples = [self.kodcode(row) if source == "train" else self.example(row) for row in rows]
        problems = [(n, self._problem(example)) for n, example in enumerate(examples, start=1)]
        problems = [(n, problem) for n, problem in problems if problem]
        if problems and (source == "heldout" or len(problems) == len(examples)):
            number, problem = problems[0]
            raise InputError(f"{self.name}, {source}, row {number}: {problem}")
        if problems:
            # training can do without these rows, but an incomplete held-out set would be another one
            log.warning(
                "%d of %d training rows are left out, as row %d: %s", len(problems), len(rows), *problems[0]
            )
        without = {number for number, _ in problems}
        return [example for n, example in enumerate(examples, start=1) if n not in without]

    def _problem(self, example: Example) -> str | None:
        try:
            return None if self.tests(example) else "it has no tests"
        except (SyntaxError, ValueError) as error:
            return f"its tests can't be read: {error}"

    def kodcode(self, row: Mapping[str, Any]) -> Example:
        """Return the example of a row of KodCode; the question names what the tests will import."""
        question = str(row["question"]).rstrip()
        declared = signatures(row["solution"], imported_names(row["test"]))
        if declared:
            question += "\n\nThe program must define:\n" + "\n".join(declared)
        return {"question": question, "solution": row["solution"], "test": row["test"]}

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the example of a held-out row; raise InputError if the row cannot be used."""
        raise NotImplementedError

    def tests(self, example: Example) -> list[str]:
        """Return the unit tests of an example, each a program text; raise ValueError or SyntaxError."""
        return pytest_tests(example["test"], example["solution"])

    def prompt(self, example: Example) -> str | Chat:
        """Return the chat of `prompt_file`, or one that asks for a ```python block in the answer tags."""
        if self.prompts is not None:
            return self.prompts(example)
        task = "Write a Python program for the task below. Unit tests will call what it defines."
        return instruct(
            task, "the whole program, in one block that opens with ```python", example["question"]
        )

    def target(self, example: Example) -> str:
        """Return the reference solution in the published form, with empty reasoning."""
        program = example["solution"].strip("\n")
        return f"<reasoning>\n</reasoning>\n<answer>\n```python\n{program}\n```\n</answer>\n"

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return `format` and `tests`; a completion without a ```python block earns nothing."""
        program = self.answer(example, completion)
        block = python_block(answer_part(completion), example.get("entry_point"))
        refused = program is None or python_block(completion) is None
        refused = refused or (self.reward_name == "released" and is_blocked(program or ""))
        if refused:
            return {"format": 0.0, "tests": 0.0}
        # in the published form an answer must be closed
        well_formed = block is not None and CLOSE in completion.rpartition(OPEN)[2]
        if self.reward_name == "intended":
            well_formed = well_formed and bool(parse_program(block or "") and (block or "").strip())
        return {"format": 0.5 * well_formed, "tests": self.fraction(example, program)}

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the program in a completion, or None if there is none."""
        return find_program(completion, example.get("entry_point"))

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return `accuracy` (1 if all tests pass), and `tests`, the fraction that pass."""
        passed = self.fraction(example, self.answer(example, completion))
        return {"accuracy": float(passed == 1.0), "tests": passed}

    def fraction(self, example: Example, program: str | None) -> float:
        """Return the fraction of the unit tests of an example that a program passes."""
        if program is None:
            return 0.0
        passed = self._run(self.runnable(example, program), tuple(self.tests(example))).passed
        return sum(passed) / len(passed)

    def runnable(self, example: Example, program: str) -> str:
        """Return the program text to run for the program of a completion."""
        return program

    def _run_anew(self, program: str, tests: tuple[str, ...]) -> Outcome:
        if parse_program(program) is None:
            return Outcome("failed", (False,) * len(tests), "no Python", 0.0, "")
        return self.cage().run(program, tests)

    def cage(self) -> Cage:
        """Return the cage in which programs run; raise InputError if this machine cannot isolate code."""
        if self._cage is None:
            self._cage = self._new_cage()
        return self._cage

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example of a saved completion, by its `example` or its `task_id`."""
        example = record.get("example")
        if isinstance(example, Mapping) and {"question", "solution"} <= example.keys():
            return example
        if "task_id" in record:
            for row in self.examples("heldout"):
                if str(row["task_id"]) == str(record["task_id"]):
                    return row
        raise InputError(
            f"a saved completion of {self.name} needs `example`, or a `task_id` of the held-out rows; "
            f"the line has {', '.join(map(str, record))}, with task_id {record.get('task_id')!r}"
        )
