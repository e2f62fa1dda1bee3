"""Any text to any reward and parser: finite numbers, in bounded time, without an exception."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spg.tasks import question_answering
from spg.tasks.gsm8k import GSM8K
from spg.tasks.math500 import Math500
from spg.tasks.parsing.arithmetic import python_value
from spg.tasks.parsing.math_verify import verify
from spg.tasks.sudoku import Sudoku

PUZZLE = {"puzzle": "0034341221434321", "solution": "1234341221434321"}
RULES = (("intended", "d1"), ("released", "spg"))
SUDOKU = (
    ("template", "bare", "intended", "exact"),
    ("template", "instruct", "released", "d1"),
    ("completion", "bare", "rules", "spg"),
    ("completion", "instruct", "intended", "exact"),
    ("completion", "instruct", "rules", "d1"),
)
TASKS: list[tuple[Any, dict[str, Any]]] = [
    *((GSM8K(reward, parser), {"question": "?", "answer": "#### 18"}) for reward, parser in RULES),
    *((Math500(reward, parser), {"problem": "?", "answer": r"\frac12"}) for reward, parser in RULES),
    *((Sudoku(form, reward, parser, style), PUZZLE) for form, style, reward, parser in SUDOKU),
]
ROBUST: list[tuple[Any, dict[str, Any]]] = [
    (GSM8K(), {"question": "?", "answer": "#### 18"}),
    (Math500(), {"problem": "?", "answer": r"\frac12"}),
]
# what the rules look for, so that random texts get past their first step
PIECES = (
    *("<answer>", "</answer>", "<reasoning>", "</reasoning>", "<|eot_id|>", "```", "1234341221434321"),
    *(r"\boxed{", r"\boxed", r"\boxed ", r"\fbox{", r"\frac", r"\sqrt", r"\text{ ", r"\$", r"\%", "\n", " "),
    *"{}./=x$%^!9",
    *("18", "-5", "1,080", ".5", "**", "nan", "1_0", "\u0661", "\xb2", "\x1c", "\ud800"),
)
TEXTS = st.one_of(
    st.text(st.characters(), max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=16).map("".join),
    st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.integers(1, 60)).map(
        lambda drawn: "".join(drawn[0]) * drawn[1]
    ),
)


def scored(task: Any, example: dict[str, Any], text: str) -> None:
    answer = task.answer(example, text)
    assert answer is None or isinstance(answer, str)
    numbers = {**task.reward(example, text), **task.measure(example, text)}
    assert all(isinstance(n, float) and math.isfinite(n) for n in numbers.values()), numbers
    assert 0 <= task.measure(example, text)["accuracy"] <= 1


@given(TEXTS)
@settings(max_examples=400, deadline=None)
def test_any_text(text: str) -> None:
    for task, example in TASKS:
        scored(task, example, text)


@pytest.mark.parametrize("text", ["(-8)**.5//2", "2//(-8)**.5", "-(-8)**.5//(-8)**.5"])
def test_a_floor_of_no_real_number_is_no_value(text: str) -> None:
    assert python_value(text) is None


@given(TEXTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_with_math_verify(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(question_answering, "verify", functools.partial(verify, timeout=0.3))
    for task, example in ROBUST:
        started = time.monotonic()
        scored(task, example, f"<answer>{text}</answer>")
        assert time.monotonic() - started < 10


LONG = {
    "opening tags": "<answer>",
    "closing tags": "</answer>",
    "reasonings": "<reasoning>",
    "passages": "</reasoning><answer>",
    "boxes": r"\boxed{",
    "boxes with space": r"\boxed ",
    "open": "{",
    "fences": "<answer>```1 ",
    "fence": "```",
    "digits": "9",
    "digits and space": "1234123412341234 ",
    "space": " ",
    "lines": "\n",
    "fractions": r"\frac",
    "roots": r"\sqrt3",
    "decimals": "1.",
    "minus": "-",
    "slashes": "1/",
    "per cent": "%",
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("before", ["", "<reasoning><answer>"])
def test_long_texts_take_little_time(name: str, before: str) -> None:
    """A hundred thousand characters: a rule that is quadratic in them would take half a minute."""
    text = before + LONG[name] * (100_000 // len(LONG[name]))
    for task, example in (*TASKS, *ROBUST):
        started = time.monotonic()
        scored(task, example, text)
        scored(task, example, f"{text}}}</answer>")
        assert time.monotonic() - started < 4, type(task).__name__
