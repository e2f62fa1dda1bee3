"""What the coding tasks share: finding the program in a completion, its unit tests, rewards, the caged run.

Each test is a text of its own that imports the program as `solution`, so that one that fails hides no
other. What a test needs beside the function under test comes from the data set, never from the program.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.rules import Count, CountOrZero, Positive, checked
from spg.sandbox.host import Cage, Outcome
from spg.tasks.base import BaseTask
from spg.tasks.datasets import Published, load
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
    """Programs on demand, judged by unit tests in a cage; a subclass names the held-out data.

    Trained on KodCode-Light-RL-10K. reward (paper, G.1): `format` 0.5 if the program stands in a ```python
    block inside the answer tags, and `tests`, the fraction of unit tests passed; both 0 without such a
    block anywhere. `released` is 0 too for a program that imports a module of `BLOCKED`; the paper describes
    it, its code is not public. `intended` has no such list, the cage being the defence, but pays for the
    format only where the program is Python.
    path: file or folder with held-out rows, train_path: with KodCode's; without, the hub. prompt_file:
    prompts of another code base. isolation, wall_seconds, memory_mb: of the cage; workers: runs at once, 0
    for one a CPU. eval_size: held-out rows of each half that are used, None for all. A program of more than
    `LONGEST` characters counts as no Python. Raises InputError for values that are not allowed, and where
    code can't be walled in.
    """

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
        # reward and measure ask for the same run
        self._run = lru_cache(maxsize=4096)(self._run_anew)

    def load_rows(self, source: str) -> Sequence[Example]:
        published = KODCODE if source == "train" else self.heldout
        option = "task.train_path" if source == "train" else "task.path"
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
            # training can do without; a held-out set that is not whole would be another one
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
        """Return the example that a row of KodCode is; the question names what the tests will import."""
        question = str(row["question"]).rstrip()
        declared = signatures(row["solution"], imported_names(row["test"]))
        if declared:
            question += "\n\nThe program must define:\n" + "\n".join(declared)
        return {"question": question, "solution": row["solution"], "test": row["test"]}

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the example that a held-out row is; raises InputError where it can't be used."""
        raise NotImplementedError

    def tests(self, example: Example) -> list[str]:
        """Return an example's unit tests, a program text each; raises ValueError or SyntaxError without."""
        return pytest_tests(example["test"], example["solution"])

    def prompt(self, example: Example) -> str | Chat:
        """Return the chat of `prompt_file`, or one that asks for a ```python block in the answer tags."""
        if self.prompts is not None:
            return self.prompts(example)
        task = "Write a Python program for the task below. Unit tests will call what it defines."
        return instruct(
            task, "the whole program, in one block that opens with ```python", example["question"]
        )

    def demonstrations(self) -> Sequence[Example]:
        return self.examples("train")

    def template(self, example: Example) -> Template | None:
        """Return None: completions are free."""
        return None

    def target(self, example: Example) -> str:
        """Return the reference solution in the published form, without reasoning."""
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
        # an answer that is never closed is no answer in the published form
        well_formed = block is not None and CLOSE in completion.rpartition(OPEN)[2]
        if self.reward_name == "intended":
            well_formed = well_formed and bool(parse_program(block or "") and (block or "").strip())
        return {"format": 0.5 * well_formed, "tests": self.fraction(example, program)}

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the program that a completion holds, None where it holds none."""
        return find_program(completion, example.get("entry_point"))

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return accuracy (1 if all tests pass), and the fraction of `tests` that do."""
        passed = self.fraction(example, self.answer(example, completion))
        return {"accuracy": float(passed == 1.0), "tests": passed}

    def fraction(self, example: Example, program: str | None) -> float:
        """Return the fraction of an example's unit tests that a program passes."""
        if program is None:
            return 0.0
        passed = self._run(self.runnable(example, program), tuple(self.tests(example))).passed
        return sum(passed) / len(passed)

    def runnable(self, example: Example, program: str) -> str:
        """Return the text to run for the program of a completion."""
        return program

    def _run_anew(self, program: str, tests: tuple[str, ...]) -> Outcome:
        if parse_program(program) is None:
            return Outcome("failed", (False,) * len(tests), "no Python", 0.0, "")
        return self.cage().run(program, tests)

    def cage(self) -> Cage:
        """Return the cage that programs run in; raises InputError where code can't be walled in."""
        if self._cage is None:
            self._cage = self._new_cage()
        return self._cage

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example that a line of saved generations tells of, by `example` or its `task_id`."""
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
