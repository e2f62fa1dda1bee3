"""Countdown: make a target from given numbers, each used once (paper, G.1); rewards and parsers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval

from spg.core.errors import InputError
from spg.core.examples import Chat, Example
from spg.core.rules import Count, CountOrZero, Matches, Probability, Words, checked
from spg.tasks.base import SPLITS, BaseTask, GeneratedSize, PromptStyle, Shots, check_split, select_half
from spg.tasks.parsing.arithmetic import exact_value, python_value
from spg.tasks.parsing.latex import box_content, last_boxed
from spg.tasks.parsing.tags import first_answer, last_answer
from spg.tasks.problems.countdown import (
    SIGNS,
    load_published,
    make_problems,
    problem_of,
    read_problems,
    solve,
)
from spg.tasks.prompts import PromptFile, instruct

# texts that the released scorers evaluate
PLAIN = re.compile(r"[\d+\-*/().\s]+\Z")
DIGITS = re.compile(r"\d+")
LATEX_OPERATORS = {r"\div": "/", r"\times": "*", r"\cdot": "*"}
OTHER_OPERATORS = {**LATEX_OPERATORS, "\u00d7": "*", "\u00f7": "/", "\u00b7": "*", "\u2212": "-"}
EXACT = re.compile(r"[0-9+\-*/()\s]+")
EXPRESSION = frozenset("0123456789+-*/() ")
VALUE = frozenset("0123456789. ")
COPIES = 10  # of each training problem among the demonstrations
MAX_DIGITS = 4300  # of the longest number that Python reads from a text
TOLERANCE = 1e-5  # of the released scorers


class Countdown(BaseTask):
    """Write an expression with a given value that uses each given number exactly once (paper, G.1).

    Args:
        reward: `intended` gives 1.0 for a right expression in the last answer tags, 0.1 for a wrong one
            with exactly the given numbers, and 0 otherwise. `released` is the reward of the authors' code.
            It gives 0.1 for anything in the tags, and takes `2.3` for the numbers 2 and 3.
        parser: `exact` reads whole numbers, + - * / and parentheses, and computes with fractions. `d1` and
            `spg` read as the authors' evaluations: with floats, `//` and `**`.
        prompt_style: `bare` gives numbers and target only, for models trained on this task; `instruct` is a
            chat.
        prompt_file: File with the prompts of another code base, with {numbers} and {target}.
        shots: Number of worked examples in an instruct prompt.
        right_share: Share of the demonstrations that show a right solution; see `demonstrations`.
        path: File with held-out problems. Its columns are numbers, nums or input, and target or output. None
            generates problems, of which none is among the 256 published ones.
        train_path: File with training problems, or `hub` for the published ones with `numbers` numbers. None
            generates them.
        numbers: Count of numbers of a generated problem.
        max_number: Largest number of a generated problem.
        max_target: Largest target of a generated problem.
        operations: Operations of generated problems.
        train_size: Number of generated training problems; fewer if there are no more.
        eval_size: Number of generated problems of each of validation and test.
        data_seed: Seed of the generated problems.

    Raises:
        ValueError: for values that are not allowed.
    """

    name = "countdown"
    # for the configuration check: see spg.config.parts
    files = (("path",), ("train_path", "hub"), ("prompt_file",))

    @checked
    def __init__(
        self,
        reward: Literal["intended", "released"] = "intended",
        parser: Literal["exact", "d1", "spg"] = "exact",
        prompt_style: PromptStyle = "bare",
        prompt_file: str | None = None,
        shots: Shots = 0,
        right_share: Probability = 1.0,
        path: str | None = None,
        train_path: str | None = None,
        numbers: Annotated[int, Interval(ge=3, le=4), Words("3 or 4")] = 3,
        max_number: Count = 9,
        max_target: Count = 99,
        operations: Annotated[str, Matches("[-+*/]+"), Words('some of + - * /, as "+-*"')] = SIGNS,
        train_size: Count = 20000,
        eval_size: GeneratedSize = 256,
        data_seed: CountOrZero = 0,
    ) -> None:
        self.reward_name = reward
        self.parser = parser
        self.prompt_style = prompt_style
        self.shots = shots
        self.right_share = right_share
        self.path = path
        self.train_path = train_path
        self.shape = (numbers, max_number, max_target)
        self.operations = operations
        self.sizes = {"train": train_size, "validation": eval_size, "test": eval_size}
        self.data_seed = data_seed
        self.prompts = None if prompt_file is None else PromptFile(prompt_file, ("numbers", "target"))
        self._examples: dict[str, Sequence[Example]] = {}

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split, from a file or generated."""
        check_split(split)
        if split not in self._examples:
            self._examples[split] = self._load(split)
        return self._examples[split]

    def _load(self, split: str) -> Sequence[Example]:
        if split == "train" and self.train_path == "hub":
            return load_published(self.shape[0])
        if split == "train" and self.train_path is not None:
            return read_problems(self.train_path, "task.train_path")
        if split != "train" and self.path is not None:
            return select_half(read_problems(self.path, "task.path"), split)
        if split == "heldout":
            return [*self.examples("validation"), *self.examples("test")]
        seed = 3 * self.data_seed + SPLITS.index(split)
        return make_problems(split, self.sizes[split], *self.shape, seed, self.operations)

    def prompt(self, example: Example) -> str | Chat:
        """Return the prompt in the style of the task, or that of `prompt_file`."""
        if self.prompts is not None:
            return self.prompts(example)
        if self.prompt_style == "bare":
            return f"{','.join(map(str, example['numbers']))}={example['target']}<reasoning>"
        return instruct(
            "Combine the given numbers into an expression with the value that is asked for. Use every number "
            "exactly once, the operations + - * / and parentheses, and nothing else.",
            "only the expression, without an equals sign,",
            _question(example),
            [(_question(shot), self._completion(shot)) for shot in SHOTS[: self.shots]],
        )

    def target(self, example: Example) -> str:
        """Return steps and an expression for the target, or for the value that a demonstration `shows`.

        A bare completion leaves out the last step, whose result is the target.

        Raises:
            InputError: if the value cannot be made.
        """
        if self.prompt_style == "instruct":
            return self._completion(example)
        steps, expression = self._solution(example)
        return f"{','.join(steps[:-1])}</reasoning><answer>{expression}</answer>"

    def _solution(self, example: Example) -> tuple[tuple[str, ...], str]:
        value = example.get("shows", example["target"])
        solution = solve(example["numbers"], value, self.operations)
        if solution is None:
            raise InputError(f"{dict(example)} has no solution in whole numbers to learn from")
        return solution

    def _completion(self, example: Example) -> str:
        steps, expression = self._solution(example)
        return f"<reasoning>\n{','.join(steps)}\n</reasoning>\n<answer>\n{expression}\n</answer>"

    def demonstrations(self) -> Sequence[Example]:
        """Return training problems, each ten times; a share of `right_share` shows a right solution.

        The others show the solution for another target of the same numbers. From them a model learns the
        form but not the task.
        """
        problems = self.examples("train")
        rng = np.random.default_rng(self.data_seed)
        values: dict[tuple[int, ...], list[int]] = {}
        for problem in problems:
            values.setdefault(tuple(sorted(problem["numbers"])), []).append(problem["target"])
        shown: list[Example] = []
        for problem in problems:
            others = values[tuple(sorted(problem["numbers"]))]
            for _ in range(COPIES):
                right = rng.random() < self.right_share
                value = problem["target"] if right else others[rng.integers(len(others))]
                shown.append({**problem, "shows": value})
        return shown

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the one part `countdown`."""
        numbers, target = example["numbers"], example["target"]
        if self.reward_name == "released":
            return {"countdown": released_score(completion, numbers, target)}
        text = last_answer(completion)
        expression = None if text is None else expression_of(text)
        if expression is None or not _uses(expression, numbers):
            return {"countdown": 0.0}
        return {"countdown": 1.0 if exact_value(expression) == target else 0.1}

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the expression that a completion answers with, or None."""
        if self.parser != "exact":
            return published_equation(completion)
        text = last_answer(completion)
        if text is None:  # a box marks the answer as well as tags do
            text = box_content(completion)
        return None if text is None else expression_of(text)

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return accuracy (the target is made of the numbers) and whether the numbers were used (0 or 1)."""
        numbers, target = example["numbers"], example["target"]
        equation = self.answer(example, completion)
        used = equation is not None and (
            _uses(equation, numbers) if self.parser == "exact" else _has_digits_of(equation, numbers)
        )
        if equation is None or not used:
            return {"accuracy": 0.0, "numbers_used": 0.0}
        right = (
            exact_value(equation) == target
            if self.parser == "exact"
            else _near(published_value(equation), target)
        )
        return {"accuracy": float(right), "numbers_used": 1.0}

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example of a saved completion, of this project or in the authors' format."""
        if "example" in record:
            return problem_of(record["example"], "a line's `example`")
        truth = record.get("ground_truth")
        if isinstance(truth, list) and len(truth) == 2:
            return problem_of({"numbers": truth[0], "target": truth[1]}, "a line's `ground_truth`")
        raise InputError(
            "a saved Countdown completion needs `example` {numbers, target} or `ground_truth` [numbers, "
            f"target]; the line has {', '.join(record)}"
        )


# the worked examples of an instruct prompt
SHOTS: tuple[Example, ...] = (
    {"numbers": [4, 6, 9], "target": 15},
    {"numbers": [8, 20, 25], "target": 40},
    {"numbers": [2, 7, 50], "target": 93},
)


def _question(example: Example) -> str:
    return f"Numbers: {', '.join(map(str, example['numbers']))}\nTarget: {example['target']}"


def expression_of(text: str) -> str:
    """Return the expression of an answer: without box, with plain operators, without `= value` at its end."""
    boxed = box_content(text)
    text = text if boxed is None else boxed
    for sign, plain in OTHER_OPERATORS.items():
        text = text.replace(sign, plain)
    return text.replace("$", "").partition("=")[0].strip()


def _uses(expression: str, numbers: Sequence[int]) -> bool:
    """Return whether an expression of whole numbers and + - * / uses exactly these numbers."""
    return bool(EXACT.fullmatch(expression)) and _has_digits_of(expression, numbers)


def _has_digits_of(text: str, numbers: Sequence[int]) -> bool:
    """Return whether the runs of digits in a text are exactly these numbers, as in the released scorers."""
    found = list(itertools.islice(DIGITS.finditer(text), len(numbers) + 1))
    if len(found) != len(numbers) or any(len(run.group()) > MAX_DIGITS for run in found):
        return False
    return sorted(int(run.group()) for run in found) == sorted(numbers)


def _near(value: Any, target: float) -> bool:
    try:
        return value is not None and bool(abs(value - target) < TOLERANCE)
    except OverflowError:  # a whole number too large for a float target
        return False


def published_value(equation: str) -> int | float | complex | None:
    """Return the value that the authors' scorers compute for an equation, or None if they compute none."""
    return python_value(equation.strip()) if PLAIN.match(equation) else None


def released_score(completion: str, numbers: Sequence[int], target: float) -> float:
    """Return the released reward: 0 without answer tags, 1 for the value of the target, else 0.1.

    It is 0.1 too for texts on which the authors' code would not end (9**9**9).
    """
    equation = last_answer(completion)
    if equation is None:
        return 0.0
    right = _has_digits_of(equation, numbers) and _near(published_value(equation), target)
    return 1.0 if right else 0.1


def published_equation(completion: str) -> str:
    """Return the equation that d1 and SPG evaluate: in a box, else in tags, else the whole text."""
    boxed = last_boxed(completion)
    if boxed is None:
        boxed = first_answer(completion)
    equation = completion if boxed is None else boxed
    for sign, plain in LATEX_OPERATORS.items():
        equation = equation.replace(sign, plain)
    return _before_equals(equation)


def _before_equals(text: str) -> str:
    """Return the text before the first = that stands between an expression and a number, else the text."""
    end = text.find("=")
    while end != -1:
        start = end
        while start > 0 and text[start - 1] in EXPRESSION:
            start -= 1
        if start < end and text[end + 1 : end + 2] and text[end + 1] in VALUE:
            return text[start:end].strip()
        end = text.find("=", end + 1)
    return text
