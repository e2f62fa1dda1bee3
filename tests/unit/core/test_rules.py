"""A rule allows what its words say, and a checked constructor refuses the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Interval, Lt

from spg.core import rules
from spg.core.rules import Count, Positive, Probability, Seed, Share, Words, checked

Auto = Probability | Literal["auto"]
Few = Annotated[int, Interval(ge=3, le=4), Words("3 or 4")]
Signs = Annotated[str, rules.Matches(r"[-+*/]+"), Words('some of + - * /, as "+-*"')]
CASES: list[tuple[Any, str, list[Any], list[Any]]] = [
    (Positive, "a number above 0", [1, 0.1], [0, -1, "1", True, None, math.inf, math.nan]),
    (rules.NotNegative, "a number, 0 or more", [0, 0.0, 3], [-1e-9, False]),
    (Count, "a whole number, 1 or more", [1, 10], [0, 1.0, True, "1", None]),
    (rules.CountOrZero, "a whole number, 0 or more", [0], [-1]),
    (Probability, "a number from 0 to 1", [0, 1, 0.5], [1.01, -0.1]),
    (Share, "a number from 0 to below 1", [0, 0.99], [1]),
    (Seed, "a whole number from 0 to 2147483647", [0, 2**31 - 1], [-1, 2**31]),
    (Auto, "a number from 0 to 1, or auto", ["auto", 0.5], ["other", 2]),
    (Count | None, "a whole number, 1 or more, or null", [None, 1], [0]),
    (Literal["a", "b"], "one of: a, b", ["a"], ["c", None]),
    (Literal["a", "b"] | None, "one of: a, b, or null", ["a", None], ["c"]),
    (bool, "true or false", [True, False], [0, 1, "true"]),
    (Few, "3 or 4", [3, 4], [2, 3.0]),
    (Signs, 'some of + - * /, as "+-*"', ["+", "+-"], ["", "+a", 3]),
    (Annotated[float, Lt(3)], "a number, below 3", [2], [3]),
    (Annotated[int, Ge(2)], "a whole number, 2 or more", [2], [1]),
    (Probability | Positive | None, "a number from 0 to 1, or a number above 0, or null", [7], ["7"]),
]


@pytest.mark.parametrize(("rule", "words", "good", "bad"), CASES, ids=[words for _, words, _, _ in CASES])
def test_a_rule_allows_what_its_words_say(rule: Any, words: str, good: list[Any], bad: list[Any]) -> None:
    assert rules.is_rule(rule)
    assert rules.words(rule) == words
    assert all(rules.allows(rule, value) for value in good)
    assert not any(rules.allows(rule, value) for value in bad)


def test_what_is_no_rule() -> None:
    assert not any(map(rules.is_rule, [str, list, Any, str | None, dict[str, int]]))


class Part:
    @checked
    def __init__(self, size: Count, name: str = "", *, share: Share | None = None) -> None:
        self.size = size


@checked
@dataclass(frozen=True)
class Numbers:
    size: Count
    share: Share = 0.0


class Child(Part):
    @checked
    def __init__(self, size: Count) -> None:
        super().__init__(size)


def test_a_checked_constructor_names_value_and_rule() -> None:
    assert Part(2, name=3).size == Numbers(size=2).size == Child(2).size == 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^size=0 is out of range; allowed: a whole number, 1 or more$"):
        Part(0)
    with pytest.raises(ValueError, match="share=1 is out of range"):
        Part(1, share=1)
    with pytest.raises(ValueError, match="share='a' is out of range"):
        Numbers(1, "a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="size"):
        Numbers()  # type: ignore[call-arg]
    assert Numbers(1) == Numbers(1, 0.0)
