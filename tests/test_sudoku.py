"""Sudoku: the grids, the splits, the puzzles, the rewards."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from spg.tasks import sudoku
from spg.tasks.sudoku import FEW_SHOT, HELD_OUT, PEERS, UNITS, Sudoku, all_grids, make_puzzles
from tests.helpers import GOLDEN, real_data


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
    task = Sudoku()
    for puzzle in FEW_SHOT:
        (solution,) = solutions(puzzle)
        assert sudoku.split_of(solution) == "train"
        for split in ("train", "validation", "test"):
            assert all(example["puzzle"] != puzzle for example in task.examples(split))


def test_clue_sets_with_one_solution_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for grid in (all_grids()[0], all_grids()[5], all_grids()[200]):
        unique = sudoku.unique_clue_sets(grid)
        for clues in rng.integers(0, 2**16, 150):
            puzzle = "".join(d if clues >> i & 1 else "0" for i, d in enumerate(grid))
            assert unique[clues] == (len(solutions(puzzle)) == 1)


def test_number_of_puzzles_with_4_to_12_empty_cells() -> None:
    """40,704 for a third of the grids, the class of the smallest, and more for the others."""
    counts = {
        grid: sum(len(sudoku._clue_sets_by_empty(grid)[e]) for e in range(4, 13)) for grid in all_grids()
    }
    assert counts[all_grids()[0]] == 40704
    assert sorted(set(counts.values()))[0] == 40704
    assert sum(counts.values()) == 13378944


def test_puzzles_are_fast_different_repeatable_and_have_one_solution() -> None:
    started = time.perf_counter()
    puzzles = make_puzzles(sudoku.solutions_of("train"), 5000, 4, 12, seed=1)
    assert time.perf_counter() - started < 5
    assert puzzles == make_puzzles(sudoku.solutions_of("train"), 5000, 4, 12, seed=1)
    assert puzzles != make_puzzles(sudoku.solutions_of("train"), 5000, 4, 12, seed=2)
    assert len({p["puzzle"] for p in puzzles}) == 5000
    assert {p["puzzle"].count("0") for p in puzzles} == set(range(4, 13))
    for puzzle in puzzles[:200]:
        assert solutions(puzzle["puzzle"]) == [puzzle["solution"]]
    with pytest.raises(ValueError, match="ask for at most"):
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
    ("row", "words"),
    [
        ("123,456", "line 2"),
        (f"{'0' * 16},{'1' * 16}", "no 4x4 Sudoku"),
        (f"2{'0' * 15},{all_grids()[0]}", "line 2"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sudoku(path=write(tmp_path / "bad.csv", [row]))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns Puzzle,Solution"):
        Sudoku(path=str(tmp_path / "none.csv"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"needed: Puzzle,Solution"):
        Sudoku(path=str(tmp_path / "other.csv"))


def test_cells_is_the_published_reward() -> None:
    task = Sudoku(prompt_style="instruct", format="completion")
    cases = [json.loads(line) for line in (GOLDEN / "awkward_sudoku.jsonl").read_text().splitlines()]
    assert len(cases) > 20
    for case in cases:
        example = {"puzzle": case["puzzle"], "solution": case["solution"]}
        reward = task.reward(example, case["completion"])
        assert reward == {"cells": pytest.approx(case["out"]["sudoku_reward_func"])}, case["name"]


def test_cells_agrees_on_real_generations() -> None:
    shared = real_data("sudoku/spg_test.csv").parents[2] / "goldens"
    task = Sudoku(prompt_style="instruct", format="completion")
    for length in (128, 256):
        texts = {}
        for line in (shared / "eval" / f"sudoku_{length}.jsonl").read_text().splitlines():
            row = json.loads(line)
            texts[row["shard"], row["index"]] = row["generation"]
        for line in (shared / "rewards" / "real_sudoku.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["gen_length"] != length:
                continue
            text = re.sub(r"<\|[A-Za-z0-9_]+\|>", "", texts[row["shard"], row["index"]])
            puzzle, solution = row["reward_args"]
            reward = task.reward({"puzzle": puzzle, "solution": solution}, text)["cells"]
            if row["stripped"]["extracted"] is not None and "</answer>" in text:
                assert reward == pytest.approx(row["stripped"]["sudoku_reward_func"])


EXAMPLE = {"puzzle": "0234341221434321", "solution": "1234341221434321"}


def test_rules_reward() -> None:
    task = Sudoku(reward="rules")
    solution = all_grids()[0]
    open_puzzle = {"puzzle": "0" * 16, "solution": solution}
    for other in all_grids()[::40]:
        assert task.reward(open_puzzle, other) == {"rules": 1.0}, "any valid completion"
    assert task.reward(open_puzzle, "1" * 16) == {"rules": 0.0}
    assert task.reward(EXAMPLE, EXAMPLE["solution"]) == {"rules": 1.0}
    assert task.reward(EXAMPLE, "1134341221434321") == {"rules": 0.0}, "a clue was changed"
    assert task.reward(EXAMPLE, EXAMPLE["solution"] + "1") == {"rules": 0.0}, "17 digits"
    assert task.reward(EXAMPLE, "2234341221434321") == {"rules": 0.0}
    half = {"puzzle": "00" + solution[2:], "solution": solution}
    broken = solution[0] + solution[0] + solution[2:]
    assert task.reward(half, broken)["rules"] < 1.0
    assert task.reward(half, "5" + solution[1:]) == {"rules": 0.5}, "5 is no digit of the game"


def test_cells_is_blind_to_clues_and_rules_is_not() -> None:
    completion = "1" * 16
    assert Sudoku(reward="cells").reward(EXAMPLE, completion) == {"cells": 1.0}
    assert Sudoku(reward="rules").reward(EXAMPLE, completion) == {"rules": 0.0}
    measured = Sudoku().measure(EXAMPLE, completion)
    assert measured == {"accuracy": 1.0, "solved": 0.0, "clues_intact": 0.0}
    assert Sudoku().measure(EXAMPLE, "1234\n3412 2143\n4321") == {
        "accuracy": 1.0,
        "solved": 1.0,
        "clues_intact": 1.0,
    }


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
        assert task.answer(target) == example["solution"]
    assert Sudoku(format="completion").template(example) is None


@pytest.mark.parametrize("shots", [0, 1, 2, 3])
def test_instruct_prompt_holds_right_worked_examples(shots: int) -> None:
    task = Sudoku(prompt_style="instruct", shots=shots)
    (message,) = task.prompt(EXAMPLE)
    text = message["content"]
    assert text.count("Example ") == shots
    assert text.rstrip().endswith(EXAMPLE["puzzle"])
    for puzzle in FEW_SHOT[:shots]:
        assert puzzle in text
        worked = sudoku.worked_example(puzzle)
        assert worked in text
        assert worked.split("<answer>\n")[1].split("\n")[0] == solutions(puzzle)[0]


def test_peers_are_seven_others() -> None:
    assert all(len(peers) == 7 and i not in peers for i, peers in enumerate(PEERS))


def test_limits() -> None:
    with pytest.raises(ValueError, match=r"min_empty=9 is above max_empty=5"):
        Sudoku(min_empty=9, max_empty=5)
    with pytest.raises(ValueError, match=r"reward='luck' is out of range; allowed: one of: cells, rules"):
        Sudoku(reward="luck")
