"""Sudoku: the grids, the splits, the puzzles, the rewards."""

from __future__ import annotations

import csv
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spg.core.errors import InputError
from spg.tasks.problems import sudoku
from spg.tasks.problems.sudoku import FEW_SHOT, HELD_OUT, PEERS, UNITS, all_grids, make_puzzles
from spg.tasks.sudoku import Sudoku, worked_example
from tests.helpers import GOLDEN, real_data

EMPTY = 16 - np.array([clues.bit_count() for clues in range(2**16)])  # cells that a clue set leaves


def solutions(puzzle: str) -> list[str]:
    """Return every solved grid that a puzzle's clues allow."""
    return [g for g in all_grids() if all(p in ("0", d) for p, d in zip(puzzle, g, strict=True))]


def test_all_grids() -> None:
    grids = all_grids()
    assert len(grids) == len(set(grids)) == 288
    for grid in grids:
        assert all({grid[i] for i in unit} == set("1234") for unit in UNITS)


def test_splits_share_no_solution() -> None:
    parts = [set(sudoku.solutions_of(split)) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [200, 44, 44]
    assert len(set.union(*parts)) == 288
    assert parts[1] | parts[2] == set(HELD_OUT)


def test_held_out_solutions_are_those_of_the_published_test_puzzles() -> None:
    with real_data("sudoku/spg_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["Solution"] for row in rows} == set(HELD_OUT)
    assert len(rows) == 256
    for row in rows:
        assert solutions(row["Puzzle"]) == [row["Solution"]]
        assert row["Puzzle"].count("0") in {7, 8, 9, 11, 12}


def test_few_shot_puzzles_are_in_no_split_and_their_solutions_in_training() -> None:
    task = Sudoku(train_size=2000)
    for puzzle in FEW_SHOT:
        (solution,) = solutions(puzzle)
        assert sudoku.split_of(solution) == "train"
        for split in ("train", "validation", "test"):
            assert all(example["puzzle"] != puzzle for example in task.examples(split))


def test_few_shot_puzzles_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all puzzles of this solution and size, several times: else it would be among them."""
    puzzle = FEW_SHOT[0]
    (solution,) = solutions(puzzle)
    empty = puzzle.count("0")
    supply = int((sudoku.unique_clue_sets(solution) & (empty == EMPTY)).sum())

    def made() -> set[str]:
        drawn = [make_puzzles([solution], supply // 2, empty, empty, seed) for seed in range(6)]
        return {example["puzzle"] for examples in drawn for example in examples}

    assert puzzle not in made()
    monkeypatch.setattr(sudoku, "FEW_SHOT", ())
    assert puzzle in made()


@pytest.mark.parametrize("number", [0, 5, 111, 200, 287])
def test_clue_sets_with_one_solution_against_brute_force(number: int) -> None:
    """A thousand random sets of clues, each held against all grids; the solver is another one."""
    grid = all_grids()[number]
    unique = sudoku.unique_clue_sets(grid)
    same = np.array([[a == b for a, b in zip(grid, other, strict=True)] for other in all_grids()])
    for clues in np.random.default_rng(number).integers(0, 2**16, 1000):
        kept = (clues >> np.arange(16)) & 1 == 1
        assert unique[clues] == (same[:, kept].all(1).sum() == 1)


def test_number_of_puzzles_with_4_to_12_empty_cells() -> None:
    """Relabelled, flipped and turned, the grids are of two kinds, of 96 and 192 grids."""
    wanted = (EMPTY >= 4) & (EMPTY <= 12)
    counts = Counter(int((sudoku.unique_clue_sets(grid) & wanted).sum()) for grid in all_grids())
    assert counts == {40704: 96, 49330: 192}
    assert all(not sudoku.unique_clue_sets(grid)[EMPTY > 12].any() for grid in all_grids()[::50])


def test_puzzles_are_fast_different_repeatable_and_have_one_solution() -> None:
    started = time.perf_counter()
    puzzles = make_puzzles(sudoku.solutions_of("train"), 5000, 4, 12, seed=1)
    assert time.perf_counter() - started < 2
    assert puzzles == make_puzzles(sudoku.solutions_of("train"), 5000, 4, 12, seed=1)
    assert puzzles != make_puzzles(sudoku.solutions_of("train"), 5000, 4, 12, seed=2)
    assert len({p["puzzle"] for p in puzzles}) == 5000
    assert {p["puzzle"].count("0") for p in puzzles} == set(range(4, 13))
    for puzzle in puzzles[:200]:
        assert solutions(puzzle["puzzle"]) == [puzzle["solution"]]
    (only,) = {p["puzzle"].count("0") for p in make_puzzles(all_grids(), 50, 7, 7, seed=1)}
    assert only == 7
    with pytest.raises(ValueError, match=r"10000000 puzzles were asked for, .* ask for at most \d+"):
        make_puzzles(sudoku.solutions_of("test"), 10**7, 4, 12, seed=0)


def test_examples_belong_to_their_split() -> None:
    task = Sudoku(train_size=500, eval_size=50, min_empty=6, max_empty=8)
    for split, size in (("train", 500), ("validation", 50), ("test", 50), ("heldout", 100)):
        examples = task.examples(split)
        assert len(examples) == size
        assert all(6 <= e["puzzle"].count("0") <= 8 for e in examples)
        if split != "heldout":
            assert {sudoku.split_of(e["solution"]) for e in examples} == {split}
    assert task.examples("test") == Sudoku(eval_size=50, min_empty=6, max_empty=8).examples("test")


def write(path: Path, rows: list[str]) -> str:
    path.write_text("Puzzle,Solution\n" + "\n".join(rows) + "\n")
    return str(path)


def test_rows_of_a_file_go_to_the_split_of_their_solution(tmp_path: Path) -> None:
    train, test = sudoku.solutions_of("train")[0], sudoku.solutions_of("test")[0]
    rows = [f"0{train[1:]},{train}", f"00{test[2:]},{test}", f"{FEW_SHOT[0]},{solutions(FEW_SHOT[0])[0]}"]
    task = Sudoku(path=write(tmp_path / "p.csv", rows), eval_size=10)
    assert [e["puzzle"] for e in task.examples("train")] == [f"0{train[1:]}"]
    assert [e["puzzle"] for e in task.examples("test")] == [f"00{test[2:]}"]
    assert len(task.examples("validation")) == 10, "the file has none: generated"


def test_published_file_is_read_whole() -> None:
    task = Sudoku(path=str(real_data("sudoku/spg_test.csv")))
    assert len(task.examples("heldout")) == 256
    assert len(task.examples("validation")) > 100


@pytest.mark.parametrize(
    "row",
    [
        "123,456",
        f"{'0' * 16},{'1' * 16}",
        f"2{'0' * 15},{all_grids()[0]}",
        f"{all_grids()[0]},{all_grids()[0]}",
        f"{'0' * 15},{all_grids()[0]}",
        f"{'0' * 17},{all_grids()[0]}",
        f"{'.' * 16},{all_grids()[0]}",
        "0" * 16,
    ],
    ids=["short", "rules", "clue", "full", "15 cells", "17 cells", "dots", "no solution"],
)
def test_bad_rows_are_named(tmp_path: Path, row: str) -> None:
    good = f"{'0' * 16},{all_grids()[0]}"
    with pytest.raises(ValueError, match=r"bad\.csv, line 3: .* is no 4x4 Sudoku with its solution"):
        Sudoku(path=write(tmp_path / "bad.csv", [good, row]))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns Puzzle,Solution"):
        Sudoku(path=str(tmp_path / "none.csv"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"needed: Puzzle,Solution"):
        Sudoku(path=str(tmp_path / "other.csv"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_released_is_the_published_reward() -> None:
    """In every case: too short or long, clues broken, tags missing, nested or twice, odd digits."""
    task = Sudoku(reward="released", prompt_style="instruct", format="completion")
    cases = lines(GOLDEN / "awkward_sudoku.jsonl")
    assert len(cases) > 20
    for case in cases:
        example = {"puzzle": case["puzzle"], "solution": case["solution"]}
        reward = task.reward(example, case["completion"])
        assert reward == {"cells": pytest.approx(case["out"]["sudoku_reward_func"])}, case["name"]
        assert task.answer(example, case["completion"]) == (case["out"]["extracted"] or None), case["name"]


def test_released_reads_the_last_pair_of_tags() -> None:
    task = Sudoku(reward="released", prompt_style="instruct", format="completion")
    solution = EXAMPLE["solution"]
    for text in (
        f"<answer>{solution[:4]}<answer>{solution[4:]}</answer>",
        f"<answer>{solution}</answer>2</answer>",
        f"<answer>2</answer><answer>{solution}</answer><answer>3",
    ):
        assert task.reward(EXAMPLE, text) == {"cells": 1.0}


@pytest.mark.parametrize("length", [128, 256])
def test_released_is_the_published_reward_on_real_generations(length: int) -> None:
    generations = lines(real_data(f"../goldens/eval/sudoku_{length}.jsonl"))
    rewards = lines(real_data("../goldens/rewards/real_sudoku.jsonl"))
    texts = {(row["shard"], row["index"]): row["generation"] for row in generations}
    rows = [row for row in rewards if row["gen_length"] == length]
    assert len(rows) == 256
    task = Sudoku(reward="released", prompt_style="instruct", format="completion")
    for row in rows:
        raw = texts[row["shard"], row["index"]]
        stripped = re.sub(r"<\|[A-Za-z0-9_]+\|>", "", raw)
        prefixed = f"<reasoning>{stripped}"
        unboxed = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", prefixed)
        puzzle, solution = row["reward_args"]
        readings = {"raw": raw, "stripped": stripped, "prefixed": prefixed, "unboxed": unboxed}
        for reading, text in readings.items():
            reward = task.reward({"puzzle": puzzle, "solution": solution}, text)
            assert reward == {"cells": pytest.approx(row[reading]["sudoku_reward_func"])}


@pytest.mark.parametrize("parser", ["d1", "spg"])
@pytest.mark.parametrize(("length", "right", "solved"), [(128, 240, 1), (256, 137, 0)])
def test_published_parsers_on_real_generations(parser: str, length: int, right: int, solved: int) -> None:
    task = Sudoku(parser=parser, format="completion")
    rows = lines(real_data(f"../goldens/eval/sudoku_{length}.jsonl"))
    cells = grids = 0.0
    for row in rows:
        example = task.example_of(row)
        assert (task.answer(example, row["generation"]) or "") == row[f"{parser}_parsed"]
        measured = task.measure(example, row["generation"])
        assert measured["accuracy"] == pytest.approx(row[f"{parser}_accuracy"])
        cells += measured["accuracy"] * example["puzzle"].count("0")
        grids += measured["solved"]
    assert (round(cells), grids) == (right, solved)


GRID = "1234341221434321"


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        (f"<answer>x ``` 1 2\n34 ``` {GRID}</answer>", "1234" + "0" * 12),
        (f"<answer> {GRID}<|eot_id|>", GRID),
        (f"<answer>{GRID}\n</answer>2", GRID),
        (f"<answer> </answer> {GRID}<|endoftext|>5", GRID),
        (f"<answer>{GRID}", GRID),
        (f"{GRID}9 is it, or {GRID}", GRID),
        (f"{GRID}9</answer>", GRID[1:] + "9"),
        (f"x{GRID} </answer>", GRID),
        ("<answer>No idea, really not</answer>", "Noidea,reallynot"),
        ("123412341234", None),
        ("", None),
    ],
)
def test_published_parsers(text: str, grid: str | None) -> None:
    for parser in ("d1", "spg"):
        assert Sudoku(parser=parser).answer(EXAMPLE, text) == grid


def test_examples_of_saved_lines() -> None:
    task = Sudoku()
    assert task.example_of({"example": EXAMPLE, "question": "?"}) == EXAMPLE
    for question in (EXAMPLE["puzzle"], f"Solve the following Sudoku puzzle: {EXAMPLE['puzzle']}\n"):
        assert task.example_of({"question": question, "ground_truth": EXAMPLE["solution"]}) == EXAMPLE
    for record in ({}, {"question": "?", "ground_truth": GRID}, {"example": {"puzzle": GRID}}):
        with pytest.raises(InputError, match="a saved completion of sudoku needs `example`"):
            task.example_of(record)


EXAMPLE = {"puzzle": "0234341221434321", "solution": "1234341221434321"}


def test_rules_asks_for_kept_clues_and_sixteen_digits() -> None:
    task = Sudoku(reward="rules", format="completion")
    solution = EXAMPLE["solution"]
    assert task.reward(EXAMPLE, solution) == {"rules": 1.0}
    assert task.reward(EXAMPLE, "1134341221434321") == {"rules": 0.0}, "a clue was changed"
    other = "1243342121344312"
    assert other in all_grids()
    assert task.reward(EXAMPLE, other) == {"rules": 0.0}, "valid, but of another puzzle"
    assert task.reward(EXAMPLE, solution + "1") == {"rules": 0.0}, "17 digits"
    assert task.reward(EXAMPLE, solution[:15]) == {"rules": 0.0}, "15 digits"
    assert task.reward(EXAMPLE, "") == {"rules": 0.0}
    assert task.reward({"puzzle": solution, "solution": solution}, solution) == {"rules": 0.0}, (
        "no empty cell"
    )


def test_rules_takes_any_valid_completion() -> None:
    task = Sudoku(reward="rules", format="completion")
    puzzle = {"puzzle": "12" + "0" * 14, "solution": all_grids()[0]}
    others = [grid for grid in all_grids() if grid.startswith("12")]
    assert len(others) == 24
    assert all(task.reward(puzzle, grid) == {"rules": 1.0} for grid in others)
    assert sum(Sudoku(format="completion").reward(puzzle, grid) == {"cells": 1.0} for grid in others) == 1


def test_rules_counts_the_cells_that_break_none() -> None:
    """A cell counts if its digit is 1 to 4 and differs from its row, column and box, clues included."""
    task = Sudoku(reward="rules", format="completion")
    solution = "1234341221434321"
    half = {"puzzle": "00" + solution[2:], "solution": solution}
    assert task.reward(half, "5" + solution[1:]) == {"rules": 0.5}, "5 is no digit of the game"
    assert task.reward(half, "11" + solution[2:]) == {"rules": 0.0}, "each spoils the other"
    assert task.reward(half, "21" + solution[2:]) == {"rules": 0.0}, "both meet a clue of their column"
    assert task.reward(half, "14" + solution[2:]) == {"rules": 0.5}, "the 4 stands twice in its row"
    assert task.reward({"puzzle": "0" * 16, "solution": solution}, "1" * 16) == {"rules": 0.0}


def test_released_is_blind_to_clues_and_the_others_are_not() -> None:
    completion = "1" * 16
    assert Sudoku(reward="released", format="completion").reward(EXAMPLE, completion) == {"cells": 1.0}
    assert Sudoku(reward="intended", format="completion").reward(EXAMPLE, completion) == {"cells": 0.0}
    assert Sudoku(reward="rules", format="completion").reward(EXAMPLE, completion) == {"rules": 0.0}


def test_intended_pays_for_what_was_reached() -> None:
    """A completion that is cut off has changed no clue that it did not get to."""
    task = Sudoku(format="completion")
    assert task.reward(EXAMPLE, EXAMPLE["solution"][:3]) == {"cells": 1.0}
    assert task.reward(EXAMPLE, "11") == {"cells": 0.0}


@pytest.mark.parametrize(
    ("completion", "accuracy", "solved", "intact"),
    [
        ("12 34\n34 12\n21 43\n43 21\n", 1.0, 1.0, 1.0),
        ("22 34\n34 12\n21 43\n43 21\n", 0.5, 0.0, 1.0),
        ("12 34\n34 12\n21 43\n43 22\n", 1.0, 0.0, 0.0),
        ("1" * 16, 0.5, 0.0, 0.0),
        ("1234", 0.5, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("reward", ["intended", "released", "rules"])
def test_measures(completion: str, accuracy: float, solved: float, intact: float, reward: str) -> None:
    """Of two empty cells, the first and the last but one; whatever the reward."""
    example = {"puzzle": "0234341221434301", "solution": EXAMPLE["solution"]}
    measured = Sudoku(reward=reward, format="completion").measure(example, completion)
    assert measured == {"accuracy": accuracy, "solved": solved, "clues_intact": intact}


def test_template_is_the_target_with_holes() -> None:
    for style in ("bare", "instruct"):
        task = Sudoku(prompt_style=style)
        example = task.examples("test")[0]
        template = task.template(example)
        assert template is not None
        text = "".join("?" * part if isinstance(part, int) else part for part in template)
        target = task.target(example)
        assert text.count("?") == example["puzzle"].count("0")
        assert all(a in ("?", b) for a, b in zip(text, target, strict=True))
        assert task.answer(example, target) == example["solution"]
        digits = [part for part in template if part == 1 or str(part) in "1234"]
        assert ["0" if part == 1 else part for part in digits] == list(example["puzzle"])
    whole = Sudoku(format="completion")
    assert whole.template(example) is None
    assert whole.prompt(example) == example["puzzle"] + "<answer>"
    assert whole.target(example) == example["solution"]


@pytest.mark.parametrize("style", ["bare", "instruct"])
@pytest.mark.parametrize("format", ["template", "completion"])
@pytest.mark.parametrize("reward", ["intended", "released", "rules"])
def test_the_target_earns_everything(style: str, format: str, reward: str) -> None:
    task = Sudoku(format=format, prompt_style=style, reward=reward, eval_size=20)
    for example in task.examples("validation"):
        assert task.reward(example, task.target(example)) == {"rules" if reward == "rules" else "cells": 1.0}
        assert set(task.measure(example, task.target(example)).values()) == {1.0}


@pytest.mark.parametrize("shots", [0, 1, 2, 3])
def test_instruct_prompt_holds_right_worked_examples(shots: int) -> None:
    task = Sudoku(prompt_style="instruct", shots=shots)
    prompt = task.prompt(EXAMPLE)
    assert isinstance(prompt, list), "a chat"
    (message,) = prompt
    assert message["role"] == "user"
    text = message["content"]
    assert text.count("Example ") == shots
    assert text.rstrip().endswith(EXAMPLE["puzzle"])
    for puzzle in FEW_SHOT[:shots]:
        worked = worked_example(puzzle)
        assert f"Puzzle: {puzzle}\n{worked}" in text
        (solution,) = solutions(puzzle)
        assert worked.split("<answer>\n")[1].split("\n")[0] == solution
        steps = re.findall(r"Row (\d), column (\d): only (\d) fits", worked)
        filled = {4 * (int(row) - 1) + int(column) - 1: digit for row, column, digit in steps}
        assert filled == {i: solution[i] for i, digit in enumerate(puzzle) if digit == "0"}


def test_peers_are_seven_others() -> None:
    assert all(len(peers) == 7 and i not in peers for i, peers in enumerate(PEERS))


def test_limits() -> None:
    with pytest.raises(ValueError, match=r"min_empty=9 is above max_empty=5"):
        Sudoku(min_empty=9, max_empty=5)
    with pytest.raises(ValueError, match=r"reward='luck' is out of range; .*: intended, released, rules"):
        Sudoku(reward="luck")
    with pytest.raises(ValueError, match=r"parser='math_verify' is out of range; .*: exact, d1, spg"):
        Sudoku(parser="math_verify")
    with pytest.raises(ValueError, match=r"shots=4 is out of range; allowed: a whole number from 0 to 3"):
        Sudoku(shots=4)
    with pytest.raises(
        ValueError, match=r"max_empty=13 is out of range; allowed: a whole number from 1 to 12"
    ):
        Sudoku(max_empty=13)
    with pytest.raises(
        ValueError, match=r"split='dev' is unknown; allowed: train, validation, test, heldout"
    ):
        Sudoku().examples("dev")


def test_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Do {puzzle}")
    task = Sudoku(prompt_style="instruct", prompt_file=str(path))
    assert task.prompt(EXAMPLE) == [{"role": "user", "content": f"Do {EXAMPLE['puzzle']}"}]
    with pytest.raises(InputError, match=r"set task\.prompt_style=instruct"):
        Sudoku(prompt_file=str(path))


@pytest.mark.parametrize("wrong", ["+", "<answer>", "\n"])
def test_a_template_keeps_its_places_whatever_fills_a_hole(wrong: str) -> None:
    """A character that is no digit, or a tag, must not move the cells behind it."""
    task = Sudoku()
    solution = EXAMPLE["solution"]
    text = task.target(EXAMPLE)
    puzzle = {"puzzle": "0" + solution[1:], "solution": solution}
    measured = task.measure(puzzle, wrong + text[1:])
    assert measured == {"accuracy": 0.0, "solved": 0.0, "clues_intact": 1.0}
    assert task.measure(puzzle, text)["solved"] == 1.0
    assert task.measure(puzzle, text[:8])["clues_intact"] == 0.0, "cut off by an early EOS"
