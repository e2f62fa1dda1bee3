"""Countdown problems: generate them, solve them, and read them from files."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spg.core.errors import InputError
from spg.core.examples import Example
from spg.tasks.datasets import Published, load, read

HUB = Published("Jiayi-Pan/Countdown-Tasks-3to4", "train", ("nums", "target"))
# names that files give to a problem's numbers and target
COLUMNS = (("numbers", "target"), ("nums", "target"), ("input", "output"))
SIGNS = "+-*/"
TRIALS = 50_000  # random expressions in one round of the generator

# fingerprints of the 256 published test problems; no generated problem is one of them
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
# all sets of numbers fall into 20 parts; these are held out
HELD_OUT = {0: "validation", 1: "validation", 2: "validation", 3: "test", 4: "test", 5: "test"}


def fingerprint(numbers: Sequence[int], target: int) -> bytes:
    """Return 4 bytes that identify a problem, whatever the order of its numbers."""
    return zlib.crc32(f"{','.join(map(str, sorted(numbers)))}={target}".encode()).to_bytes(4, "big")


def split_of(numbers: Sequence[int]) -> str:
    """Return the split of problems with these numbers in any order: 70, 15 and 15% of the sets of numbers."""
    checksum = zlib.crc32(",".join(map(str, sorted(numbers))).encode())
    return HELD_OUT.get(checksum % 20, "train")


def make_problems(
    split: str, count: int, size: int, max_number: int, max_target: int, seed: int, operations: str = SIGNS
) -> list[Example]:
    """Make different problems with a solution. No two splits share a set of numbers.

    Random numbers are joined by random operations, without fractions or negative numbers on the way. The
    value is the target.

    Args:
        split: train, validation or test.
        count: Number of problems; fewer come back if there are no more.
        size: Count of numbers in a problem.
        max_number: Largest number; the smallest is 1.
        max_target: Largest target; the smallest is 1.
        seed: Seed of the generator.
        operations: The operations that may be used.

    Returns:
        Problems {numbers, target}.
    """
    rng = np.random.default_rng(seed)
    problems: dict[tuple[int, ...], Example] = {}
    known = -1
    while known < len(problems) < count:
        known = len(problems)  # stop after a whole round without a new problem
        numbers = rng.integers(1, max_number + 1, size=(TRIALS, size))
        targets, fits = _join_numbers(numbers, operations, rng)
        fits &= (targets >= 1) & (targets <= max_target)
        for *row, value in np.column_stack([numbers, targets])[fits].tolist():
            if (*row, value) in problems or split_of(row) != split:
                continue
            if fingerprint(row, value) not in PUBLISHED_TEST:
                problems[*row, value] = {"numbers": row, "target": value}
    return list(problems.values())[:count]


def _join_numbers(
    numbers: np.ndarray, operations: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
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
    """A value and its expression. The rank is 1 for a sum, 2 for a product, 3 for a number."""

    value: int
    text: str
    rank: int = 3

    def at_least(self, rank: int) -> str:
        """Return the expression, in parentheses if it binds less tightly than `rank`."""
        return self.text if self.rank >= rank else f"({self.text})"


def _combine(a: Term, b: Term, operations: str) -> list[tuple[str, Term]]:
    """Return the results of each operation on two terms, without fractions and negative numbers."""
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
    """Return the steps (such as 3*5=15) and the expression that make `target`, or None if nothing does.

    The solution has no fraction or negative number on the way. It does not depend on the order of the
    numbers.
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
        for sign, made in _combine(terms[i], terms[j], operations):
            found = _search([made, *rest], target, operations)
            if found is not None:
                step = f"{terms[i].value}{sign}{terms[j].value}={made.value}"
                return (step, *found[0]), found[1]
    return None


def read_problems(path: str, option: str) -> list[Example]:
    """Read problems from a json, jsonl, csv or parquet file.

    Raises:
        InputError: if the file cannot be read, or a row is not a problem.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{option}={path} is not a file; give problems as json, jsonl, csv or parquet")
    return [problem_of(row, f"{path}, row {n}") for n, row in enumerate(read(file, (), option), start=1)]


def problem_of(row: Mapping[str, Any], where: str) -> Example:
    """Return the problem of a row, with the names `numbers` and `target`.

    Raises:
        InputError: if the row holds no problem; the message begins with `where`.
    """
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
        raise InputError(f"{where}: numbers {numbers!r} with target {target!r} are not a problem") from error
    if not problem["numbers"]:
        raise InputError(f"{where} has no numbers")
    return problem


def load_published(size: int) -> list[Example]:
    """Return the published training problems with `size` numbers, from the hub."""
    rows = [problem_of(row, HUB.name) for row in load(HUB, None, "task.train_path")]
    return [row for row in rows if len(row["numbers"]) == size]
