"""Countdown: reach a target with given numbers, each used once (paper, G.1); problems, reward, parsers."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.limits import check_limits
from spg.tasks.base import SPLITS, check_choices, check_generated, halves
from spg.tasks.datasets import Published, load, read
from spg.tasks.parsing.arithmetic import exact_value, python_value
from spg.tasks.parsing.latex import box_content, last_boxed
from spg.tasks.parsing.tags import first_answer, last_answer
from spg.tasks.prompts import PromptFile, instruct

HUB = Published("Jiayi-Pan/Countdown-Tasks-3to4", "train", ("nums", "target"))
# names that files give to a problem's numbers and target
COLUMNS = (("numbers", "target"), ("nums", "target"), ("input", "output"))

# what the released scorers let through to be evaluated
PLAIN = re.compile(r"[\d+\-*/().\s]+\Z")
DIGITS = re.compile(r"\d+")
LATEX_OPERATORS = {r"\div": "/", r"\times": "*", r"\cdot": "*"}
OTHER_OPERATORS = {**LATEX_OPERATORS, "\u00d7": "*", "\u00f7": "/", "\u00b7": "*", "\u2212": "-"}
EXACT = re.compile(r"[0-9+\-*/()\s]+")
EXPRESSION = frozenset("0123456789+-*/() ")
VALUE = frozenset("0123456789. ")
REWARDS = ("intended", "released")
PARSERS = ("exact", "d1", "spg")
SIGNS = "+-*/"
COPIES = 10  # of a training problem among the demonstrations
MAX_DIGITS = 4300  # of a number that Python reads from a text
TOLERANCE = 1e-5  # of the released scorers
TRIALS = 50_000  # random expressions to a round of the generator

# crc32 of the published 256 test problems, as `fingerprint` writes them: nothing generated is one of them
PUBLISHED_TEST = frozenset(
    bytes.fromhex(
        """
        049b2cad27476642b64e7cfa22e92fc30ad3ef236a7069ff560a0f79ed3594245a2b9c51ccae64539f2a21d3ce950c43
        d71a6bcbffb4eadb96a608ada0127a3661d6904b68ba6381876c7feda1d026fd52995d927a39d7ffe60f233be8af438c
        8ee6175ac0405c3444f40c20818b58a24f6e793c6e29b91786bb70da38e6741e12f449ead92a1c09838b0c02811c605d
        575dfaf6700495dcf553180df3e77fe903b3ddbed7ee0a50533bfee8c1d170748bddd3651d9d7e25d0824b0f206b0b6e
        9154661541d7323433986e8e5d01b80f5174d3fb026a9175046c5b84a6a2bf3e19dd301be4a5578b3082307a4a09d493
        90fc093a83401aa26880a6d52497ead79e97d2dddbe1880237c432a073faea86120ae890c1d583f0adc806953f8020f2
        61ee7dfc14bdecceabffb0bdec6cd679680ad6213eb2b250253e33d0f814e08399a2cb29d524a6db7f2f57d802554415
        8b73b633439b747bd88ff6555c4c3b8f5fc851b95fdfa9ef5446bb8b93010156e15507b8d78da2ec4b9dc9bbe4832fe6
        6ce397d90b334a69ba9c70b8343ad81f8a1fb3de9ec9b07b3d20208921792b4afe276f90c7cfec51af37043ef006b6f7
        e999ba8f8a030c280bb49fe2c63a612a755ad88cda4903767b689da5e9fb265716a2809c25f48711e0398600c2d9b06d
        c7793362cb71f7409bb5357526b8ef7e5cd66ede7e15c46997183b3db77ad68a070a1cb32976e9432269cbaf2044722d
        3d3b158b4172ad952e3b77d5f53f7493eaa64125a7f4806ac5ffffd50cfab390205296e68e6c8bfb299ab41b0c2f70d0
        912cddc3ae1a26b7ff68ffd19260c8ea2d8b266649d89d897cfb6daf4f9fcd1c571c20ea2235cd69afad398f68112270
        8ea94a784960ae1fe80552bdd327e0a6cd7eb801eb764ee4aed6eb5810f1330b5bd1744276bf96d5aa270bfd456eb161
        94e11e45670332c0a8e6c0ebc0e02bba46508f0dddd51523e47ac0269917712ab0b1c54afe3e9d8166dd2a9d5bc64be0
        f2f0b3ab78b4c109592575d2488e205d0db16fc7b5fe438c53ca14f0154d713305d48540042755ec9d3b9f0f7646685d
        7b76740a63c446d2d9b82b98c0b334b8beaad9a13fd7644a0ca44716702a3b0aa5f548a508ee826e55661aaeaf222951
        aebd4eb8993002b5c9ba03f73790f9200f40946801a228605e8bbe5a95524a2e72730d0e2990675b1241931cd592f799
        c12f160e52bfda9f2774144c517ff4709d26419d1a4e7e97f1c793c7308d89b09ee318be1111368e181986ea172946bf
        56b7fd868d6816afd9e7d8cad296316240e709c963bfb2b5f5ef835366c95c3d826e13f0b7c5d99e49aef7019e8fd8b8
        d0c3e871334923bd4d6a3348b39cbd830107faf9491a586808f694420356d15e3dd21a42a76bca235be0139027ad015a
        25f3b2509bc4dade1837619d4fba3873
        """
    )[4 * i : 4 * i + 4]
    for i in range(256)
)
# of 20 parts of all sets of numbers, those held out
HELD_OUT = {0: "validation", 1: "validation", 2: "validation", 3: "test", 4: "test", 5: "test"}


def fingerprint(numbers: Sequence[int], target: int) -> bytes:
    """Return 4 bytes that tell a problem from others, in whatever order its numbers stand."""
    return zlib.crc32(f"{','.join(map(str, sorted(numbers)))}={target}".encode()).to_bytes(4, "big")


def split_of(numbers: Sequence[int]) -> str:
    """Return the split of generated problems with these numbers, in any order: 70, 15 and 15% of the sets."""
    checksum = zlib.crc32(",".join(map(str, sorted(numbers))).encode())
    return HELD_OUT.get(checksum % 20, "train")


def make_problems(
    split: str, count: int, size: int, max_number: int, max_target: int, seed: int, operations: str = SIGNS
) -> list[Example]:
    """Make up to `count` different solvable problems of a split: {numbers, target}.

    `size` numbers from 1 to max_number are joined at random by `operations`, with no fraction or negative
    number on the way; the value, from 1 to max_target, is the target. No two splits share a set of numbers.
    Fewer come back where there are no more.
    """
    rng = np.random.default_rng(seed)
    problems: dict[tuple[int, ...], Example] = {}
    known = -1
    while known < len(problems) < count:
        known = len(problems)  # where a whole round finds nothing new, there is hardly more
        numbers = rng.integers(1, max_number + 1, size=(TRIALS, size))
        targets, fits = _joined(numbers, operations, rng)
        fits &= (targets >= 1) & (targets <= max_target)
        for *row, value in np.column_stack([numbers, targets])[fits].tolist():
            if (*row, value) in problems or split_of(row) != split:
                continue
            if fingerprint(row, value) not in PUBLISHED_TEST:
                problems[*row, value] = {"numbers": row, "target": value}
    return list(problems.values())[:count]


def _joined(numbers: np.ndarray, operations: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Join the numbers [N n] of each row at random; return the values [N], and where all went well [N]."""
    left = numbers.astype(np.int64)
    fits = np.ones(len(left), dtype=bool)
    while left.shape[1] > 1:
        left = rng.permuted(left, axis=1)
        a, b = left[:, 0], left[:, 1]
        which = np.array([SIGNS.index(sign) for sign in operations])[
            rng.integers(len(operations), size=len(left))
        ]
        divides = (b != 0) & (a % np.maximum(b, 1) == 0)
        results = {"+": a + b, "-": np.maximum(a - b, 0), "*": a * b, "/": a // np.maximum(b, 1)}
        possible = {"-": a >= b, "/": divides}
        fits &= np.choose(which, [possible.get(sign, fits) for sign in SIGNS])
        made = np.choose(which, [results[sign] for sign in SIGNS])
        left = np.column_stack([made, left[:, 2:]])
    return left[:, 0], fits


@dataclass(frozen=True)
class Term:
    """A value with the expression that it came from; rank 1 for sums, 2 for products, 3 for numbers."""

    value: int
    text: str
    rank: int = 3

    def at_least(self, rank: int) -> str:
        """Return the expression, in parentheses if it binds less tightly than `rank`."""
        return self.text if self.rank >= rank else f"({self.text})"


def _results(a: Term, b: Term, operations: str) -> list[tuple[str, Term]]:
    """Return what one operation makes of two terms, without fractions or negative numbers."""
    found = [
        ("+", Term(a.value + b.value, f"{a.text}+{b.text}", 1)),
        ("*", Term(a.value * b.value, f"{a.at_least(2)}*{b.at_least(2)}", 2)),
    ]
    if a.value >= b.value:
        found.append(("-", Term(a.value - b.value, f"{a.text}-{b.at_least(2)}", 1)))
    if b.value and a.value % b.value == 0:
        found.append(("/", Term(a.value // b.value, f"{a.at_least(2)}/{b.at_least(3)}", 2)))
    return [(sign, made) for sign, made in found if sign in operations]


def solve(numbers: Sequence[int], target: int, operations: str = SIGNS) -> tuple[tuple[str, ...], str] | None:
    """Return the steps (as 3*5=15) and the expression that make `target`, None where nothing does.

    The first solution in an order that does not depend on that of the numbers, with no fraction or negative
    number on the way.
    """
    return _solve(tuple(sorted(numbers)), target, operations)


@lru_cache(maxsize=65536)
def _solve(numbers: tuple[int, ...], target: int, operations: str) -> tuple[tuple[str, ...], str] | None:
    return _search([Term(n, str(n)) for n in numbers], target, operations)


def _search(terms: list[Term], target: int, operations: str) -> tuple[tuple[str, ...], str] | None:
    if len(terms) == 1:
        return ((), terms[0].text) if terms[0].value == target else None
    for i, j in itertools.permutations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for sign, made in _results(terms[i], terms[j], operations):
            found = _search([made, *rest], target, operations)
            if found is not None:
                step = f"{terms[i].value}{sign}{terms[j].value}={made.value}"
                return (step, *found[0]), found[1]
    return None


class Countdown:
    """Write an expression of the given numbers, each once, whose value is the target (paper, G.1).

    reward: `intended` is 1.0 for a right expression in the last answer tags, 0.1 for a wrong one of exactly
    the given numbers, 0 otherwise; `released` is the authors', which gives 0.1 for whatever stands in the
    tags and takes `2.3` for 2 and 3. parser: `exact` reads whole numbers, + - * / and parentheses in
    fractions; `d1` and `spg` as the authors' evaluations, floats, `//` and `**` included.
    prompt_style: `bare` is the numbers and the target, for models trained on this task; `instruct` a chat.
    right_share: of the demonstrations, those that show a right solution; see `demonstrations`.
    path: held-out problems, train_path: training problems, as files with the columns numbers, nums or input,
    and target or output; train_path=hub takes the published ones of `numbers` numbers. Without, problems are
    generated from the other settings, and none is one of the published 256. Raises ValueError for values out
    of range.
    """

    name = "countdown"
    workers = 1

    def __init__(
        self,
        reward: str = "intended",
        parser: str = "exact",
        prompt_style: str = "bare",
        prompt_file: str | None = None,
        shots: int = 0,
        right_share: float = 1.0,
        path: str | None = None,
        train_path: str | None = None,
        numbers: int = 3,
        max_number: int = 9,
        max_target: int = 99,
        operations: str = SIGNS,
        train_size: int = 20000,
        eval_size: int = 256,
        data_seed: int = 0,
    ) -> None:
        check_limits(
            operations=operations,
            prompt_style=prompt_style,
            shots=shots,
            numbers=numbers,
            max_number=max_number,
        )
        check_limits(
            right_share=right_share,
            max_target=max_target,
            train_size=train_size,
            eval_size=eval_size,
            data_seed=data_seed,
        )
        check_generated(eval_size)
        check_choices(self.name, reward=(reward, REWARDS), parser=(parser, PARSERS))
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
        if split not in SPLITS:
            raise InputError(f"split={split!r} is unknown; allowed: {', '.join(SPLITS)}")
        if split not in self._examples:
            self._examples[split] = self._load(split)
        return self._examples[split]

    def _load(self, split: str) -> Sequence[Example]:
        if split == "train" and self.train_path == "hub":
            rows = [_problem(row, HUB.name) for row in load(HUB, None, "task.train_path")]
            return [row for row in rows if len(row["numbers"]) == self.shape[0]]
        if split == "train" and self.train_path is not None:
            return read_problems(self.train_path, "task.train_path")
        if split != "train" and self.path is not None:
            return halves(read_problems(self.path, "task.path"), split)
        if split == "heldout":
            return [*self.examples("validation"), *self.examples("test")]
        seed = 3 * self.data_seed + SPLITS.index(split)
        return make_problems(split, self.sizes[split], *self.shape, seed, self.operations)

    def prompt(self, example: Example) -> str | Chat:
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

    def template(self, example: Example) -> Template | None:
        return None

    def target(self, example: Example) -> str:
        """Return steps and an expression for the target, or for what a demonstration `shows` instead.

        A bare completion leaves out the last step, whose result is the target. Raises InputError where the
        value can't be made.
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
        """Return training problems, each ten times, `right_share` of which show a right solution.

        The others show that of another target of the same numbers: the form is learned, the task is not.
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
        numbers, target = example["numbers"], example["target"]
        if self.reward_name == "released":
            return {"countdown": released_score(completion, numbers, target)}
        text = last_answer(completion)
        expression = None if text is None else expression_of(text)
        if expression is None or not _uses(expression, numbers):
            return {"countdown": 0.0}
        return {"countdown": 1.0 if exact_value(expression) == target else 0.1}

    def answer(self, example: Example, completion: str) -> str | None:
        if self.parser != "exact":
            return published_equation(completion)
        text = last_answer(completion)
        if text is None:  # a box says where the answer is as well as tags do
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
        if "example" in record:
            return _problem(record["example"], "a line's `example`")
        truth = record.get("ground_truth")
        if isinstance(truth, list) and len(truth) == 2:
            return _problem({"numbers": truth[0], "target": truth[1]}, "a line's `ground_truth`")
        raise InputError(
            "a saved Countdown completion needs `example` {numbers, target} or `ground_truth` [numbers, "
            f"target]; the line has {', '.join(record)}"
        )


# worked examples of an instruct prompt
SHOTS: tuple[Example, ...] = (
    {"numbers": [4, 6, 9], "target": 15},
    {"numbers": [8, 20, 25], "target": 40},
    {"numbers": [2, 7, 50], "target": 93},
)


def _question(example: Example) -> str:
    return f"Numbers: {', '.join(map(str, example['numbers']))}\nTarget: {example['target']}"


def read_problems(path: str, option: str) -> list[Example]:
    """Read problems from a json, jsonl, csv or parquet file; raises InputError where a row is none."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{option}={path} is no file; give problems as json, jsonl, csv or parquet")
    return [_problem(row, f"{path}, row {n}") for n, row in enumerate(read(file, (), option), start=1)]


def _problem(row: Mapping[str, Any], where: str) -> Example:
    for numbers_name, target_name in COLUMNS:
        if numbers_name in row and target_name in row:
            numbers, target = row[numbers_name], row[target_name]
            break
    else:
        raise InputError(
            f"{where} has {', '.join(row)}; needed: numbers (or nums, input) and target (or output)"
        )
    try:
        if isinstance(numbers, str):
            numbers = [int(text) for text in numbers.strip("[]").replace(",", " ").split()]
        target = float(target)
        problem = {
            "numbers": [int(n) for n in numbers],
            "target": int(target) if target == int(target) else target,
        }
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: numbers {numbers!r} with target {target!r} are no problem") from error
    if not problem["numbers"]:
        raise InputError(f"{where} has no numbers")
    return problem


def expression_of(text: str) -> str:
    """Return an answer's expression: out of its box, with plain operators, without `= value` behind it."""
    boxed = box_content(text)
    text = text if boxed is None else boxed
    for written, plain in OTHER_OPERATORS.items():
        text = text.replace(written, plain)
    return text.replace("$", "").partition("=")[0].strip()


def _uses(expression: str, numbers: Sequence[int]) -> bool:
    """Return whether an expression of whole numbers and + - * / uses exactly these numbers."""
    return bool(EXACT.fullmatch(expression)) and _has_digits_of(expression, numbers)


def _has_digits_of(text: str, numbers: Sequence[int]) -> bool:
    """Return whether the runs of digits in a text are exactly these numbers, as the released scorers ask."""
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
    """Return the value that the authors' scorers give an equation, None where they give none."""
    return python_value(equation.strip()) if PLAIN.match(equation) else None


def released_score(completion: str, numbers: Sequence[int], target: float) -> float:
    """Return the released reward: 0 without answer tags, 1 for the target's value, else 0.1.

    Where the authors' code would not end (9**9**9), 0.1.
    """
    equation = last_answer(completion)
    if equation is None:
        return 0.0
    right = _has_digits_of(equation, numbers) and _near(published_value(equation), target)
    return 1.0 if right else 0.1


def published_equation(completion: str) -> str:
    """Return the equation that d1's and SPG's evaluations read: boxed, else in tags, else the whole text."""
    boxed = last_boxed(completion)
    if boxed is None:
        boxed = first_answer(completion)
    equation = completion if boxed is None else boxed
    for written, plain in LATEX_OPERATORS.items():
        equation = equation.replace(written, plain)
    return _before_equals(equation)


def _before_equals(text: str) -> str:
    """Return what stands before the first = between an expression and a number, else the text."""
    end = text.find("=")
    while end != -1:
        start = end
        while start > 0 and text[start - 1] in EXPRESSION:
            start -= 1
        if start < end and text[end + 1 : end + 2] and text[end + 1] in VALUE:
            return text[start:end].strip()
        end = text.find("=", end + 1)
    return text
