"""MATH500: data, prompts, and rewards and parsers against what the authors' code computed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spg.core.errors import InputError
from spg.tasks.math500 import Math500
from tests.helpers import GOLDEN, real_data

PARTS = {"correctness": "correctness_reward_func_math", "format": "boxed_and_answer_tags_format_reward"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_released_on_awkward_completions() -> None:
    """Where the solution's own box never closes the authors' code raises; ours: no answer is right."""
    task = Math500(reward="released")
    cases = lines(GOLDEN / "awkward_math500.jsonl")
    assert len(cases) > 50
    raising = []
    for case in cases:
        reward = task.reward({"problem": "", "solution": case["answer"]}, case["completion"])
        out = case["out"]
        if isinstance(out[PARTS["correctness"]], dict):
            raising.append(case["name"])
            out = {**out, PARTS["correctness"]: 0.0}
        assert reward == {p: pytest.approx(out[f]) for p, f in PARTS.items()}, case["name"]
    assert sorted(raising) == ["both_none_paths", "unbalanced_both"]


@pytest.mark.parametrize("length", [128, 256])
def test_released_on_real_completions(length: int) -> None:
    """Every line, in four readings: as decoded, without special tokens, with an opening tag, no boxes."""
    texts = {
        (r["shard"], r["index"]): r["generation"]
        for r in lines(real_data(f"../goldens/eval/math500_{length}.jsonl"))
    }
    rows = [r for r in lines(real_data("../goldens/rewards/real_math500.jsonl")) if r["gen_length"] == length]
    assert len(rows) == 500
    task = Math500(reward="released")
    for row in rows:
        raw = texts[row["shard"], row["index"]]
        stripped = re.sub(r"<\|[A-Za-z0-9_]+\|>", "", raw)
        prefixed = f"<reasoning>{stripped}"
        unboxed = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", prefixed)
        readings = {"raw": raw, "stripped": stripped, "prefixed": prefixed, "unboxed": unboxed}
        for reading, text in readings.items():
            reward = task.reward({"problem": "", "solution": row["reward_args"][0]}, text)
            assert reward == {p: pytest.approx(row[reading][f]) for p, f in PARTS.items()}
            assert sum(reward.values()) == pytest.approx(row[reading]["sum"])


@pytest.mark.parametrize("parser", ["d1", "spg"])
@pytest.mark.parametrize(("length", "right"), [(128, 130), (256, 162)])
def test_published_parsers_on_real_completions(parser: str, length: int, right: int) -> None:
    task = Math500(parser=parser)
    rows = lines(real_data(f"../goldens/eval/math500_{length}.jsonl"))
    total = 0.0
    for row in rows:
        example = task.example_of(row)
        assert task.answer(example, row["generation"]) == row[f"{parser}_parsed"]
        accuracy = task.measure(example, row["generation"])["accuracy"]
        assert accuracy == row[f"{parser}_is_correct"]
        total += accuracy
    assert total == right


def test_math_verify_takes_all_that_the_published_parsers_take() -> None:
    task = Math500()
    rows = lines(real_data("../goldens/eval/math500_256.jsonl"))[:200]
    right = [task.measure(task.example_of(r), r["generation"])["accuracy"] for r in rows]
    assert all(a >= r["d1_is_correct"] for a, r in zip(right, rows, strict=True))
    assert 1 < sum(right) - sum(r["d1_is_correct"] for r in rows) < 15


EXAMPLE = {"problem": "?", "solution": r"Not \boxed{7} but \boxed{\frac{1}{2}}."}
FORM = "<reasoning>\na\n</reasoning>\n<answer>\n{}\n</answer>\n"


@pytest.mark.parametrize(
    ("answer", "correctness", "format", "released"),
    [
        (r"\boxed{\frac12}", 2.0, 1.0, (2.0, 0.75)),
        (r"\boxed{0.5}", 2.0, 1.0, (2.0, 0.75)),
        (r"\boxed{\frac{2}{4}}", 2.0, 1.0, (0.0, 0.75)),
        (r"\boxed{7}", 0.0, 1.0, (0.0, 0.75)),
        (r"\frac{1}{2}", 0.0, 0.75, (0.0, 0.75)),
        ("\boxed{5}", 0.0, 0.75, (0.0, 1.0)),
    ],
)
def test_intended_mends_the_slips(
    answer: str, correctness: float, format: float, released: tuple[float, float]
) -> None:
    text = FORM.replace("{}", answer)
    assert Math500().reward(EXAMPLE, text) == {"correctness": correctness, "format": format}
    assert tuple(Math500(reward="released").reward(EXAMPLE, text).values()) == released


def test_boxes_outside_tags() -> None:
    assert Math500().reward(EXAMPLE, r"\boxed{0.5}") == {"correctness": 2.0, "format": 0.5}
    assert Math500().reward(EXAMPLE, "") == {"correctness": 0.0, "format": 0.25}
    assert Math500().reward(EXAMPLE, r"\boxed 0.5$ \boxed{7}") == {"correctness": 0.0, "format": 0.5}


def test_splits_and_columns(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    (tmp_path / "test.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": "2"}\n')
    task = Math500(path=str(tmp_path))
    assert task.examples("train") == [EXAMPLE]
    assert task.examples("validation") == [{"problem": "a", "answer": "1"}]
    assert len(task.examples("heldout")) == 2
    (tmp_path / "test.jsonl").write_text('{"problem": "a", "solution": "none"}\n')
    with pytest.raises(
        InputError, match=r"math500, heldout, row 1: no answer in the columns problem, solution"
    ):
        Math500(path=str(tmp_path)).examples("test")


def test_published_file() -> None:
    task = Math500(path=str(real_data("math500/test.jsonl")))
    assert [len(task.examples(split)) for split in ("validation", "test", "heldout")] == [250, 250, 500]
    for example in task.examples("heldout"):
        assert task.measure(example, task.target(example)) == {"accuracy": 1.0, "parsed": 1.0}


def test_the_target_earns_everything_intended() -> None:
    target = Math500().target(EXAMPLE)
    assert EXAMPLE["solution"] in target
    assert Math500().reward(EXAMPLE, target) == {"correctness": 2.0, "format": 1.0}


@pytest.mark.parametrize("shots", [0, 3])
def test_prompt(shots: int) -> None:
    task = Math500(shots=shots)
    (message,) = task.prompt(EXAMPLE)
    assert message["content"].count("Example ") == shots
    assert message["content"].endswith("\n\n?")
    for (_, completion), answer in zip(task.worked, ("7", "1/6", r"\sqrt{12}"), strict=True):
        assert Math500().reward({"answer": answer}, completion) == {"correctness": 2.0, "format": 1.0}


def test_examples_of_saved_lines() -> None:
    task = Math500()
    assert task.example_of({"example": EXAMPLE}) == EXAMPLE
    assert task.example_of({"question": "?", "ground_truth": "x"}) == {"problem": "?", "answer": "x"}
    with pytest.raises(InputError, match="a saved completion of math500 needs `example` with `problem`"):
        task.example_of({"question": "?"})
    with pytest.raises(InputError, match="no answer in the columns"):
        task.example_of({"example": {"problem": "?"}})


@pytest.mark.parametrize(("number", "text"), [(5, "5"), (0, "0"), (2.0, "2")])
def test_answers_may_be_numbers(number: float, text: str) -> None:
    task = Math500()
    example = task.example({"problem": "?", "answer": number, "solution": ""}, "here")
    assert example == {"problem": "?", "answer": text}
    for parser in ("math_verify", "d1"):
        assert Math500(parser=parser).measure(example, rf"\boxed{{{text}}}")["accuracy"] == 1.0
