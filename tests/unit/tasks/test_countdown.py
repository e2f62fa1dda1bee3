"""Countdown: problems, solver, the reward's two readings, and the parsers, against the authors'."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spg.core.errors import InputError
from spg.tasks.countdown import Countdown, released_score
from spg.tasks.parsing.arithmetic import MAX_BITS, exact_value, python_value
from spg.tasks.problems.countdown import (
    PUBLISHED_TEST,
    fingerprint,
    make_problems,
    read_problems,
    solve,
    split_of,
)
from tests.helpers import GOLDEN, real_data

EXAMPLE = {"numbers": [2, 3, 5], "target": 10}


@pytest.fixture(scope="module")
def task() -> Countdown:
    return Countdown()


def test_splits_are_disjoint_solvable_and_full(task: Countdown) -> None:
    seen: set[tuple[int, ...]] = set()
    for split, count in (("train", 5000), ("validation", 256), ("test", 256)):
        problems = task.examples(split)
        assert len(problems) == len({(*p["numbers"], p["target"]) for p in problems}) >= count
        sets = {tuple(sorted(p["numbers"])) for p in problems}
        assert not sets & seen, "a set of numbers belongs to one split"
        seen |= sets
        assert any(p["numbers"] != sorted(p["numbers"]) for p in problems)
        for problem in problems:
            assert split_of(problem["numbers"]) == split
            assert all(1 <= n <= 9 for n in problem["numbers"])
            assert 1 <= problem["target"] <= 99
            assert solve(problem["numbers"], problem["target"]) is not None
    assert task.examples("heldout") == [*task.examples("validation"), *task.examples("test")]
    assert Countdown().examples("test") == task.examples("test"), "the same at every call"
    assert Countdown(data_seed=1).examples("test") != task.examples("test")


def test_a_range_without_enough_problems_gives_all_there_are() -> None:
    """Numbers 1 and 2: every reachable problem of the split, each once."""
    found = make_problems("train", 1000, 3, 2, 99, seed=0)
    every = {
        (numbers, target)
        for numbers in itertools.product((1, 2), repeat=3)
        for target in range(1, 100)
        if solve(numbers, target) is not None and split_of(numbers) == "train"
    }
    assert {(tuple(p["numbers"]), p["target"]) for p in found} == every
    assert every


def test_four_numbers() -> None:
    for problem in make_problems("train", 50, 4, 100, 100, seed=3):
        steps, expression = solve(problem["numbers"], problem["target"])
        assert len(steps) == 3
        assert released_score(f"<answer>{expression}</answer>", problem["numbers"], problem["target"]) == 1.0


def test_operations_are_those_that_were_asked_for() -> None:
    task = Countdown(operations="+-")
    for problem in task.examples("validation"):
        steps, expression = solve(problem["numbers"], problem["target"], "+-")
        assert not set("*/") & set(expression + "".join(steps))
        assert task.target(problem) == f"{steps[0]}</reasoning><answer>{expression}</answer>"
    assert solve((2, 3, 4), 24, "+-") is None
    assert solve((2, 3, 4), 24) is not None


def test_nothing_generated_is_a_published_test_item() -> None:
    rows = read_problems(str(real_data("countdown/countdown_cd3_test.jsonl")), "task.path")
    published = {fingerprint(r["numbers"], r["target"]) for r in rows}
    assert len(rows) == 256
    assert published == PUBLISHED_TEST
    made = {
        fingerprint(p["numbers"], p["target"])
        for split in ("train", "validation", "test")
        for p in make_problems(split, 5000, 3, 100, 100, seed=5)
    }
    assert len(made) > 14000
    assert not made & published


def test_published_items_are_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the list made of generated problems, they are no longer generated."""
    before = make_problems("train", 200, 3, 9, 99, seed=0)
    keys = frozenset(fingerprint(p["numbers"], p["target"]) for p in before[:50])
    monkeypatch.setattr("spg.tasks.problems.countdown.PUBLISHED_TEST", keys)
    after = {fingerprint(p["numbers"], p["target"]) for p in make_problems("train", 5000, 3, 9, 99, seed=0)}
    assert not after & keys


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=3, max_size=3), st.integers(1, 99))
def test_what_the_solver_says_is_right(numbers: list[int], target: int) -> None:
    solution = solve(numbers, target)
    if solution is None:
        return
    steps, expression = solution
    assert exact_value(expression) == target
    assert sorted(map(int, re.findall(r"\d+", expression))) == sorted(numbers)
    for step in steps:
        left, _, right = step.partition("=")
        assert exact_value(left) == int(right)
    assert steps[-1].endswith(f"={target}")


def test_the_solver_finds_what_enumeration_finds() -> None:
    """Left and right combs over all orders and signs, the only two shapes of three numbers."""
    for numbers in ((2, 3, 7), (4, 4, 9), (1, 6, 8)):
        reachable = set()
        for a, b, c in itertools.permutations(numbers):
            for one, two in itertools.product("+-*/", repeat=2):
                for text in (f"({a}{one}{b}){two}{c}", f"{a}{one}({b}{two}{c})"):
                    inner = exact_value(re.search(r"\((.*)\)", text).group(1))
                    value = exact_value(text)
                    fine = value is not None and inner.denominator == value.denominator == 1
                    if fine and inner >= 0 and value >= 0:
                        reachable.add(int(value))
        assert {t for t in range(300) if solve(numbers, t) is not None} == {t for t in reachable if t < 300}


# --- arithmetic ------------------------------------------------------------------------------------

terms = st.recursive(
    st.integers(0, 40).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        st.tuples(inner, st.sampled_from(["//", "**", " % "]), inner).map("".join),
        inner.map(lambda text: f"{text}.5"),
    ),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True)
@given(terms)
def test_values_are_pythons(text: str) -> None:
    ours = python_value(text)
    try:
        value = eval(text, {"__builtins__": None}, {}) if "**" not in text else None
    except (SyntaxError, ArithmeticError, TypeError):
        value = None
    if "%" in text:
        assert ours is None
    elif "**" not in text:
        assert ours == value or (ours is None and value is None)
    plain = re.sub(r"(\d+)", r"Fraction(\1)", text)
    exact = exact_value(text)
    if any(mark in text for mark in (".", "//", "**", "%")):
        assert exact is None
    elif exact is not None:
        assert exact == eval(plain, {"Fraction": Fraction}, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2**10", 1024),
        ("7//2", 3),
        ("2.5*2", 5.0),
        ("(-8)**.5", (-8) ** 0.5),
        ("2**-1", 0.5),
        ("1**99999999999", 1),
        ("9**9**9", None),
        (f"2**{MAX_BITS + 1}", None),
        ("2(3)", None),
        ("()", None),
        ("1/0", None),
        ("0**-1", None),
        ("02", None),
        ("2+3 # ok", 5),
        ("__import__('os')", None),
        ("(" * 300 + "1" + ")" * 300, None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_python_values_by_hand(text: str, value: object) -> None:
    assert python_value(text) == value


def test_exact_values_by_hand() -> None:
    assert exact_value("1/3+1/3+1/3") == 1, "in floats this is 1.0 too, but 49*(1/49) is not"
    assert exact_value("49*(1/49)") == 1 != 49 * (1 / 49)
    for text in ("2.0", "2**2", "7//2", "1j", "True", "a", "1e3", "'x'", "[1]", "1,2", "1 if 1 else 2"):
        assert exact_value(text) is None, text


def test_hostile_arithmetic_takes_bounded_time() -> None:
    started = time.perf_counter()
    for text in ("9**9**9", "9**9**9*0", "(9**9)**(9**9)", "-" * 1999 + "1", "1+" * 900 + "1", "9**99999"):
        python_value(text)
        exact_value(text)
    assert time.perf_counter() - started < 2


# --- rewards and parsers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "intended", "released"),
    [
        ("<answer>2+3+5</answer>", 1.0, 1.0),
        ("<answer>\\boxed{2+3+5}</answer>", 1.0, 0.1),
        ("<answer>2+3+5 = 10</answer>", 1.0, 0.1),
        ("<answer>2 \u00d7 3 + 5</answer>", 0.1, 0.1),
        ("<answer>2+3</answer>", 0.0, 0.1),
        ("<answer>nonsense</answer>", 0.0, 0.1),
        ("<answer>2+3+5", 0.0, 0.0),
        ("2+3+5", 0.0, 0.0),
        ("<answer>2*3+5</answer>", 0.1, 0.1),
        ("<answer>1</answer><answer>2+3+5</answer>", 1.0, 1.0),
        ("<answer>2.3+5</answer>", 0.0, 0.1),
        ("<answer>5**2//3</answer>", 0.1, 0.1),
    ],
)
def test_the_two_readings(completion: str, intended: float, released: float) -> None:
    assert Countdown(reward="intended").reward(EXAMPLE, completion) == {"countdown": intended}
    assert Countdown(reward="released").reward(EXAMPLE, completion) == {"countdown": released}


def test_released_accepts_floats_and_floor_division_as_published() -> None:
    released, intended = Countdown(reward="released"), Countdown(reward="intended")
    for text, example in (
        ("2.3*10", {"numbers": [2, 3, 10], "target": 23}),
        ("7//2*5", {"numbers": [2, 5, 7], "target": 15}),
        ("2**3+1", {"numbers": [1, 2, 3], "target": 9}),
    ):
        assert released.reward(example, f"<answer>{text}</answer>") == {"countdown": 1.0}
        assert intended.reward(example, f"<answer>{text}</answer>")["countdown"] < 1.0
    nines = {"numbers": [9, 9, 9], "target": 0}
    assert released.reward(nines, "<answer>9**9**9</answer>") == {"countdown": 0.1}, "the reference hangs"


def awkward() -> list[dict]:
    lines = (GOLDEN / "awkward_countdown.jsonl").read_text().splitlines()
    return list(map(json.loads, lines))


@pytest.mark.parametrize("case", awkward(), ids=lambda case: case["name"])
def test_released_reward_of_awkward_texts(case: dict) -> None:
    example = {"numbers": case["numbers"], "target": case["target"]}
    expected = case["out"]["countdown_reward_func"]
    if isinstance(expected, dict):  # where the reference hangs or raises
        expected = 0.1
    assert Countdown(reward="released").reward(example, case["completion"]) == {"countdown": expected}


def variants(generation: str) -> dict[str, str]:
    stripped = re.sub(r"<\|[A-Za-z0-9_]+\|>", "", generation)
    prefixed = f"<reasoning>{stripped}"
    unboxed = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", prefixed)
    return {"raw": generation, "stripped": stripped, "prefixed": prefixed, "unboxed": unboxed}


def evaluated(length: int) -> list[dict]:
    path = real_data(f"../goldens/eval/countdown_{length}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_released_reward_of_real_generations() -> None:
    texts = {
        (length, row["shard"], row["index"]): row["generation"]
        for length in (128, 256)
        for row in evaluated(length)
    }
    task, count = Countdown(reward="released"), 0
    for line in real_data("../goldens/rewards/real_countdown.jsonl").read_text().splitlines():
        row = json.loads(line)
        target, numbers = row["reward_args"]
        for name, text in variants(texts[row["gen_length"], row["shard"], row["index"]]).items():
            got = task.reward({"numbers": numbers, "target": target}, text)["countdown"]
            assert got == row[name]["countdown_reward_func"]
            count += 1
    assert count == 2048


@pytest.mark.parametrize(("length", "percent"), [(128, "20.7"), (256, "19.5")])
def test_parsers_agree_with_the_authors_item_by_item(length: int, percent: str) -> None:
    rows = evaluated(length)
    for parser in ("d1", "spg"):
        task, right = Countdown(parser=parser), 0.0
        for row in rows:
            example = task.example_of(row)
            assert task.answer(example, row["generation"]) == row[f"{parser}_parsed"]
            accuracy = task.measure(example, row["generation"])["accuracy"]
            assert accuracy == row[f"{parser}_is_correct"]
            right += accuracy
        assert f"{100 * right / len(rows):.1f}" == percent


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=400) | st.text("0123456789+-*/(). \n=<>answer{}\\boxd,", max_size=200))
def test_any_text_gets_a_finite_score(text: str) -> None:
    for completion in (text, f"<answer>{text}</answer>", f"<answer>\\boxed{{{text}}}</answer>"):
        for reward in ("intended", "released"):
            assert 0 <= Countdown(reward=reward).reward(EXAMPLE, completion)["countdown"] <= 1
        for parser in ("exact", "d1", "spg"):
            measured = Countdown(parser=parser).measure(EXAMPLE, completion)
            assert all(math.isfinite(value) for value in measured.values())


def test_long_texts_take_bounded_time() -> None:
    started = time.perf_counter()
    for text in (
        "<answer>" * 50_000,
        "1" * 400_000,
        "1+" * 200_000 + "=",
        "\\boxed{" * 50_000,
        "=" * 400_000,
    ):
        for parser in ("exact", "d1"):
            Countdown(parser=parser).measure(EXAMPLE, text)
        Countdown(reward="released").reward(EXAMPLE, f"<answer>{text}</answer>")
    assert time.perf_counter() - started < 5


# --- prompts, targets, files -----------------------------------------------------------------------


def test_a_target_earns_everything(task: Countdown) -> None:
    for style in ("bare", "instruct"):
        styled = Countdown(prompt_style=style)
        for example in task.examples("train")[:50]:
            text = styled.target(example)
            assert styled.reward(example, text) == {"countdown": 1.0}
            assert styled.measure(example, text) == {"accuracy": 1.0, "numbers_used": 1.0}


def test_demonstrations_may_show_another_target(task: Countdown) -> None:
    shown = Countdown(right_share=0.3).demonstrations()
    right = sum(e["shows"] == e["target"] for e in shown) / len(shown)
    assert 0.3 < right < 0.4, "0.3, and what chance adds"
    for example in shown[::500]:
        text = task.target(example)
        assert task.measure({**example, "target": example["shows"]}, text)["accuracy"] == 1.0
    assert all(e["shows"] == e["target"] for e in task.demonstrations())


def test_prompts(task: Countdown, tmp_path: Path) -> None:
    assert task.prompt(EXAMPLE) == "2,3,5=10<reasoning>"
    (message,) = Countdown(prompt_style="instruct", shots=2).prompt(EXAMPLE)
    assert message["content"].count("<answer>\n") == 2
    assert message["content"].endswith("Target: 10")
    file = tmp_path / "prompt.json"
    chat = [
        {"role": "user", "content": "{numbers} make {target}; \\boxed{}"},
        {"role": "assistant", "content": "<reasoning>"},
    ]
    file.write_text(json.dumps(chat))
    assert Countdown(prompt_file=str(file)).prompt(EXAMPLE) == [
        {"role": "user", "content": "[2, 3, 5] make 10; \\boxed{}"},
        chat[1],
    ]


def test_problems_from_files(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"input": "30,100,93", "output": "23"}\n{"nums": [1, 2, 3], "target": 6}\n')
    task = Countdown(path=str(path))
    assert task.examples("heldout") == [
        {"numbers": [30, 100, 93], "target": 23},
        {"numbers": [1, 2, 3], "target": 6},
    ]
    assert len(task.examples("validation")) == len(task.examples("test")) == 1
    csv = tmp_path / "p.csv"
    csv.write_text('nums,target\n"[4, 5, 6]",15\n')
    assert Countdown(train_path=str(csv)).examples("train") == [{"numbers": [4, 5, 6], "target": 15}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n', "row 1 has a; needed: numbers"),
        ('{"nums": [1, "x"], "target": 3}\n', "row 1: numbers"),
        ('{"nums": [], "target": 3}\n', "row 1 has no numbers"),
        ("{\n", "line 1"),
        ("", "no rows"),
    ],
)
def test_a_wrong_file_is_told(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        Countdown(path=str(path)).examples("heldout")


def test_wrong_settings_are_told() -> None:
    for setting in (
        {"reward": "cells"},
        {"parser": "math_verify"},
        {"numbers": 5},
        {"path": "nowhere.jsonl"},
    ):
        with pytest.raises(ValueError, match=r"allowed|not a file"):
            Countdown(**setting).examples("heldout")
    with pytest.raises(InputError, match="ground_truth"):
        Countdown().example_of({"completion": "x"})
