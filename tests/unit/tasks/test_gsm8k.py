"""GSM8K: data, prompts, and rewards and parsers against what the authors' code computed."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from spg.core.errors import InputError
from spg.tasks.gsm8k import GSM8K
from tests.helpers import GOLDEN, real_data

# our parts' names to the authors' functions'
PARTS = {
    "xml": "xmlcount_reward_func",
    "soft_format": "soft_format_reward_func",
    "strict_format": "strict_format_reward_func",
    "integer": "int_reward_func",
    "correctness": "correctness_reward_func",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_released_on_awkward_completions() -> None:
    task = GSM8K(reward="released")
    cases = lines(GOLDEN / "awkward_gsm8k.jsonl")
    assert len(cases) > 20
    for case in cases:
        reward = task.reward({"question": "", "answer": case["answer"]}, case["completion"])
        assert reward == {p: pytest.approx(case["out"][f]) for p, f in PARTS.items()}, case["name"]


@pytest.mark.parametrize("length", [128, 256])
def test_released_on_real_completions(length: int) -> None:
    """Every line, in four readings: as decoded, without special tokens, with an opening tag, no boxes."""
    texts = {
        (r["shard"], r["index"]): r["generation"]
        for r in lines(real_data(f"../goldens/eval/gsm8k_{length}.jsonl"))
    }
    rows = [r for r in lines(real_data("../goldens/rewards/real_gsm8k.jsonl")) if r["gen_length"] == length]
    assert len(rows) == 1130
    task = GSM8K(reward="released")
    for row in rows:
        raw = texts[row["shard"], row["index"]]
        stripped = re.sub(r"<\|[A-Za-z0-9_]+\|>", "", raw)
        prefixed = f"<reasoning>{stripped}"
        unboxed = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", prefixed)
        readings = {"raw": raw, "stripped": stripped, "prefixed": prefixed, "unboxed": unboxed}
        for reading, text in readings.items():
            reward = task.reward({"question": "", "answer": row["reward_args"][0]}, text)
            assert reward == {p: pytest.approx(row[reading][f]) for p, f in PARTS.items()}
            assert sum(reward.values()) == pytest.approx(row[reading]["sum"])


@pytest.mark.parametrize(
    ("parser", "length", "right"), [("d1", 128, 783), ("d1", 256, 863), ("spg", 128, 792), ("spg", 256, 880)]
)
def test_published_parsers_on_real_completions(parser: str, length: int, right: int) -> None:
    task = GSM8K(parser=parser)
    rows = lines(real_data(f"../goldens/eval/gsm8k_{length}.jsonl"))
    for row in rows:
        example = task.example_of(row)
        answer = task.answer(example, row["generation"])
        assert (None if answer is None else float(answer)) == row[f"{parser}_parsed"]
        assert task.measure(example, row["generation"]) == {
            "accuracy": float(row[f"{parser}_is_correct"]),
            "parsed": float(answer is not None),
        }
    assert sum(row[f"{parser}_is_correct"] for row in rows) == right
    unknown = [row for row in rows if row["ground_truth"] is None]
    assert len(unknown) == 2
    assert all(row[f"{parser}_parsed"] < 0 for row in unknown), "right, but d1 reads no negative solutions"


def test_math_verify_on_real_completions() -> None:
    """Unlike d1 and spg it reads 43,500 whole, and no number out of a text without tags and boxes."""
    task = GSM8K()
    rows = lines(real_data("../goldens/eval/gsm8k_256.jsonl"))[:300]
    right = [task.measure(task.example_of(r), r["generation"])["accuracy"] for r in rows]
    assert sum(abs(a - r["spg_is_correct"]) for a, r in zip(right, rows, strict=True)) <= 10


FORM = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n"
EXAMPLE = {"question": "?", "answer": "so it is\n#### 1,080"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (FORM.format("a\nb", "1080"), (0.5, 0.5, 0.5, 0.5, 2.0)),
        (FORM.format("a", r"\boxed{1,080}"), (0.5, 0.5, 0.5, 0.5, 2.0)),
        (FORM.format("a", "$1,080.00").rstrip(), (0.5, 0.5, 0.5, 0.5, 2.0)),
        (FORM.format("a", "1080.5"), (0.5, 0.5, 0.5, 0.0, 0.0)),
        (FORM.format("a", "-1080"), (0.5, 0.5, 0.5, 0.5, 0.0)),
        (FORM.format("a", "1080 or 1081"), (0.5, 0.5, 0.5, 0.0, 0.0)),
        (FORM.format("a", "1080") + "x" * 20, (0.48, 0.5, 0.0, 0.5, 2.0)),
        ("<reasoning>a</reasoning> <answer>1080</answer>", (0.0, 0.5, 0.0, 0.5, 2.0)),
        ("<answer>\n1080", (0.0, 0.0, 0.0, 0.5, 2.0)),
        ("1080", (0.0, 0.0, 0.0, 0.5, 2.0)),
        ("It is 1080", (0.0, 0.0, 0.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_intended_mends_the_slips(text: str, parts: tuple[float, ...]) -> None:
    assert tuple(GSM8K().reward(EXAMPLE, text).values()) == pytest.approx(parts)


def test_intended_and_released_have_the_same_parts() -> None:
    text = FORM.format("a\nb", r"\boxed{1080}")
    released = GSM8K(reward="released").reward(EXAMPLE, text)
    assert list(released) == list(GSM8K().reward(EXAMPLE, text)) == list(PARTS)
    assert sum(released.values()) < 0.5


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>\n\\boxed{1080}\n</answer>", 1.0),
        ("<answer>1,080 apples</answer>", 1.0),
        ("<answer>\\boxed{\\$1080}", 1.0),
        ("<answer>\\boxed{1080><|eot_id|>", 1.0),
        ("so \\boxed{1080}.", 1.0),
        ("<answer></answer> \\boxed{1080}", 1.0),
        ("\\boxed{1080}<answer>3</answer>", 0.0),
        ("1080", 0.0),
        ("", 0.0),
    ],
)
def test_math_verify(text: str, right: float) -> None:
    assert GSM8K().measure(EXAMPLE, text)["accuracy"] == right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{}\boxed{...}\boxed{x}\boxed{3 of 4}\boxed{5}", 3.0),
        ("\\boxed{\n7}<answer>about 8 or 9.5</answer>", 9.5),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{1_000}", 1000.0),
        (r"\boxed{١٨}", 18.0),
        ("<answer>-inf</answer>", -math.inf),
        ("<answer>1e999</answer>", math.inf),
        ("<answer>5</answer><answer>6</answer>", 5.0),
        ("<answer>" + "9" * 5000 + "</answer>", math.inf),
    ],
)
@pytest.mark.parametrize("parser", ["d1", "spg"])
def test_published_parsers(parser: str, text: str, number: float) -> None:
    answer = GSM8K(parser=parser).answer(EXAMPLE, text)
    assert answer is not None
    assert float(answer) == number


@pytest.mark.parametrize("truth", ["$18", "18.", "9" * 400, "-1,080.5"])
def test_solutions_may_be_written_in_any_way(truth: str) -> None:
    number = truth.strip("$.").replace(",", "")
    for parser in ("math_verify", "d1", "spg"):
        task = GSM8K(parser=parser)
        example = task.example_of({"question": "?", "ground_truth": truth})
        assert task.measure(example, rf"\boxed{{{number}}}")["accuracy"] == 1.0
        assert task.reward(example, f"<answer>{number}</answer>")["correctness"] == 2.0
        assert task.measure(example, r"\boxed{2}")["accuracy"] == 0.0


def test_spg_reads_on_where_d1_stops() -> None:
    for text in ("<answer>4, or 5", "it is 5", "5</answer>6"):
        assert GSM8K(parser="d1").answer(EXAMPLE, text) is None
        assert GSM8K(parser="spg").answer(EXAMPLE, text) == "5.0"


def write(folder: Path, split: str, count: int) -> None:
    rows = [{"question": f"{split} {n}?", "answer": f"<<1+{n}={n + 1}>>\n#### {n + 1}"} for n in range(count)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_splits_of_a_folder_or_files(tmp_path: Path) -> None:
    write(tmp_path, "train", 3)
    write(tmp_path, "test", 5)
    for task in (
        GSM8K(path=str(tmp_path)),
        GSM8K(path=str(tmp_path / "test.jsonl"), train_path=str(tmp_path)),
        GSM8K(path=str(tmp_path / "test.jsonl"), train_path=str(tmp_path / "train.jsonl")),
    ):
        sizes = [len(task.examples(split)) for split in ("train", "validation", "test", "heldout")]
        assert sizes == [3, 3, 2, 5]
        assert task.examples("train")[0]["question"] == "train 0?"
        assert task.examples("heldout")[1] == task.examples("test")[0]
    with pytest.raises(InputError, match="split='dev' is unknown"):
        task.examples("dev")


@pytest.mark.parametrize(("count", "heldout"), [(40, 10), (3000, 512)])
def test_a_file_of_training_rows_serves_both(count: int, heldout: int, tmp_path: Path) -> None:
    """What is held out does not depend on how many of these rows are asked for."""
    write(tmp_path, "train", count)
    write(tmp_path, "test", 2)  # beside it, and not asked for
    for size, used in ((None, heldout), (3, 6), (10_000, heldout)):
        task = GSM8K(path=str(tmp_path / "train.jsonl"), eval_size=size)
        asked = {split: [e["question"] for e in task.examples(split)] for split in ("train", "heldout")}
        assert asked["train"] == [f"train {n}?" for n in range(count - heldout)]
        assert asked["heldout"] == [f"train {n}?" for n in range(count - heldout, count)][:used]
        assert [len(task.examples(split)) for split in ("validation", "test")] == [used // 2] * 2


def test_a_file_by_another_name_or_beside_training_rows_is_held_out_whole(tmp_path: Path) -> None:
    write(tmp_path, "train", 8)
    other = (tmp_path / "train.jsonl").rename(tmp_path / "rows.jsonl")
    assert len(GSM8K(path=str(other)).examples("heldout")) == 8
    assert len(GSM8K(path=str(other), eval_size=2).examples("heldout")) == 4
    write(tmp_path, "train", 8)
    task = GSM8K(path=str(tmp_path / "train.jsonl"), train_path=str(other))
    assert [len(task.examples(split)) for split in ("train", "heldout")] == [8, 8]


def test_a_row_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, "train", 8)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"question": "?", "answer": "none"}\n')
    with pytest.raises(InputError, match="gsm8k, heldout, row 9: the answer"):
        GSM8K(path=str(tmp_path / "train.jsonl")).examples("heldout")


def test_packed_training_rows_are_found_beside_the_held_out_ones(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, 2)
        plain = tmp_path / f"{split}.jsonl"
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    task = GSM8K(path=str(tmp_path))
    assert [len(task.examples(split)) for split in ("train", "heldout")] == [2, 2]


def test_without_files_and_network_both_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        GSM8K().examples("train")
    words = "connect to the network, or give a local copy with task.path=<folder with train.* and test.*> or "
    assert f"{words}task.train_path=<file or folder>" in str(caught.value)


@pytest.mark.parametrize(("number", "text"), [(5, "5"), (0, "0"), (2.0, "2"), (2.5, "2.5")])
def test_answers_may_be_numbers(number: float, text: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "?", "answer": number}))
    task = GSM8K(path=str(tmp_path))
    (example,) = task.examples("heldout")
    assert example == {"question": "?", "answer": text}
    assert task.measure(example, rf"\boxed{{{number}}}")["accuracy"] == 1.0


def test_published_files() -> None:
    task = GSM8K(path=str(real_data("gsm8k/test.jsonl").parent))
    sizes = [len(task.examples(split)) for split in ("train", "validation", "test", "heldout")]
    assert sizes == [7473, 660, 659, 1319]


def test_the_target_earns_everything_intended() -> None:
    task = GSM8K()
    example = {"question": "?", "answer": "Half of 48 is <<48/2=24>>24.\nSo 24.\n#### 24"}
    target = task.target(example)
    assert "<<" not in target
    assert "Half of 48 is 24.\nSo 24." in target
    assert sum(task.reward(example, target).values()) == 4.0
    for parser in ("math_verify", "d1", "spg"):
        assert GSM8K(parser=parser).measure(example, target) == {"accuracy": 1.0, "parsed": 1.0}
    assert task.template(example) is None


@pytest.mark.parametrize("shots", [0, 3])
def test_prompt(shots: int) -> None:
    task = GSM8K(shots=shots)
    (message,) = task.prompt(EXAMPLE)
    text = message["content"]
    assert text.count("Example ") == shots
    assert all(tag in text for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>", r"\boxed{}"))
    assert text.endswith(EXAMPLE["question"])
    for question, completion in task.worked[:shots]:
        assert completion in text
        answer = completion.split("boxed{")[1].split("}")[0]
        assert sum(task.reward({"question": question, "answer": answer}, completion).values()) == 4.0


def test_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Say: {question}")
    task = GSM8K(prompt_file=str(tmp_path / "p.txt"))
    assert task.prompt(EXAMPLE) == [{"role": "user", "content": "Say: ?"}]


def test_what_can_not_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"reward='rules' is out of range; allowed: one of: intended, released"
    ):
        GSM8K(reward="rules")
    with pytest.raises(ValueError, match=r"parser='exact' is out of range; .*: math_verify, d1, spg"):
        GSM8K(parser="exact")
    with pytest.raises(ValueError, match="shots=4 is out of range"):
        GSM8K(shots=4)
    (tmp_path / "test.jsonl").write_text('{"question": "?", "answer": "none"}\n')
    with pytest.raises(InputError, match=r"gsm8k, heldout, row 1: the answer 'none' ends in no number"):
        GSM8K(path=str(tmp_path)).examples("heldout")


def test_examples_of_saved_lines() -> None:
    task = GSM8K()
    assert task.example_of({"example": EXAMPLE}) == EXAMPLE
    assert task.example_of({"question": "?", "ground_truth": 18.0}) == {"question": "?", "answer": "18"}
    assert task.example_of({"question": "?", "ground_truth": 2.5})["answer"] == "2.5"
    unknown = task.example_of({"question": "?", "ground_truth": None})
    for parser in ("math_verify", "d1", "spg"):
        assert GSM8K(parser=parser).measure(unknown, "<answer>-10</answer>") == {
            "accuracy": 0.0,
            "parsed": 1.0,
        }
    for record in ({}, {"question": "?"}, {"ground_truth": 1}, {"example": {"puzzle": "1"}}):
        with pytest.raises(InputError, match="a saved completion of gsm8k needs"):
            task.example_of(record)
    with pytest.raises(InputError, match="ends in no number"):
        task.example_of({"question": "?", "ground_truth": [1, 2]})


@pytest.mark.parametrize("reward", ["intended", "released"])
def test_what_the_prompt_shows_is_what_the_reward_pays_for(reward: str) -> None:
    task = GSM8K(reward=reward, shots=3)
    (message,) = task.prompt({"question": "Q", "answer": "#### 1"})
    shown = message["content"].split("<reasoning>\n")[1:]
    assert len(shown) == 3
    for text, answer in zip(shown, ("19", "28", "90"), strict=True):
        completion = "<reasoning>\n" + text.partition("</answer>")[0] + "</answer>\n"
        parts = task.reward({"question": "Q", "answer": f"#### {answer}"}, completion)
        assert (parts["correctness"], parts["integer"]) == (2.0, 0.5)
    assert ("boxed" in message["content"]) == (reward == "intended")
