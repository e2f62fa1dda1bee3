"""Sudoku 4x4: grids, puzzles with one solution, the paper's split by solution, rewards, parsers.

A grid is a text of 16 digits, row by row; 0 is an empty cell. Cells are numbered 0 to 15, and a set
of cells is a 16-bit mask with bit i for cell i.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.limits import check_limits
from spg.tasks.base import SPLITS, check_choices, check_generated
from spg.tasks.parsing.tags import CLOSE, OPEN, last_answer
from spg.tasks.prompts import PromptFile

CELLS = 16
TAG = re.compile(r"</?(?:answer|reasoning)>")
REWARDS = ("intended", "released", "rules")
PARSERS = ("exact", "d1", "spg")

# where the authors' evaluations look for a grid; each pattern is searched in time linear in the text
END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
FENCED = re.compile(r"```([\d\s]++)```")
CLOSED = re.compile(r"(\d{16})\s*+</answer>")
ALONE = re.compile(r"\b(\d{16})\b")
PUZZLE = re.compile(r"[0-9]{16}")
QUESTION = re.compile(r"Sudoku puzzle: ([0-9]{16})")

# The 88 solutions of the paper's test puzzles; the other 200 grids are for training.
HELD_OUT = tuple(  # one text is shorter to read than 88
    """
    1234342143122143 1234432124133142 1243341221344321 1243341243212134 1324241332414132
    1324241342313142 1324421324313142 1324421331422431 1324423121433412 1324423124133142
    1324423134122143 1342421324313124 1342423131242413 1423231431424231 1423321441322341
    1423324121344312 1423324123144132 1432321423414123 1432324141232314 2134342112434312
    2134342113424213 2134431232411423 2134432112433412 2143341242311324 2143342143121234
    2143431234211234 2143432132141432 2314142342313142 2314143241233241 2314412314323241
    2314413212433421 2314413214233241 2314413234211243 2341143231244213 2341143232144123
    2341412312343412 2341412332141432 2341413214233214 2413132432414132 2413314243211234
    2431132431424213 2431132442133142 2431134231244213 2431134232144123 2431134242133124
    2431312412434312 3124243112434312 3124243143121243 3124421314322341 3124421323411432
    3124421324311342 3142241312344321 3142241313244231 3142421324311324 3142423113242413
    3142423123141423 3142423124131324 3214412313422431 3241142343122134 3241412314322314
    3241413213242413 3241413223141423 3412123421434321 3412123443212143 3412124343212134
    3412214312344321 3412214343211234 3421123443122143 3421214312344312 4123231414323241
    4123231432411432 4123234114323214 4123234132141432 4123234134121234 4123321413422431
    4123321423411432 4132231414233241 4132321414232341 4132324113242413 4132324123141423
    4213134224313124 4213134234212134 4231132424133142 4231134224133124 4312123434212143
    4312213434211243 4312214312343421 4321123421433412
    """.split()
)

# The puzzles of the few-shot prompts, in no split; their solutions are on the training side.
FEW_SHOT = ("3014002020004130", "0000100420013142", "2001403002001420")


def _units() -> tuple[tuple[int, ...], ...]:
    rows = [tuple(range(4 * r, 4 * r + 4)) for r in range(4)]
    columns = [tuple(range(c, CELLS, 4)) for c in range(4)]
    boxes = [tuple(8 * (b // 2) + 2 * (b % 2) + o for o in (0, 1, 4, 5)) for b in range(4)]
    return tuple(rows + columns + boxes)


UNITS = _units()
PEERS = tuple(frozenset(j for unit in UNITS if i in unit for j in unit) - {i} for i in range(CELLS))


@cache
def all_grids() -> tuple[str, ...]:
    """Return the 288 solved grids, in ascending order."""
    grids: list[str] = []

    def extend(cells: str) -> None:
        if len(cells) == CELLS:
            grids.append(cells)
            return
        taken = {cells[j] for j in PEERS[len(cells)] if j < len(cells)}
        for digit in "1234":
            if digit not in taken:
                extend(cells + digit)

    extend("")
    return tuple(grids)


@cache
def unique_clue_sets(solution: str) -> np.ndarray:
    """Return bool [65536]: True at the clue sets (16-bit masks) that determine `solution`.

    A clue set fails exactly if it avoids all cells in which some other grid differs, so failure
    spreads from each such set of agreeing cells to all its subsets.
    """
    own = np.array(list(solution))
    others = np.array([list(grid) for grid in all_grids() if grid != solution])
    agreeing = ((others == own) << np.arange(CELLS)).sum(1)
    fails = np.zeros((2,) * CELLS, dtype=bool)  # axis a stands for bit 15 - a
    fails.reshape(-1)[agreeing] = True
    for axis in range(CELLS):
        without, with_bit = (np.take(fails, i, axis=axis) for i in (0, 1))
        fails[(slice(None),) * axis + (0,)] = without | with_bit
    return ~fails.reshape(-1)


@cache
def _clue_sets_by_empty(solution: str) -> tuple[np.ndarray, ...]:
    valid = np.flatnonzero(unique_clue_sets(solution))
    empty = CELLS - np.bitwise_count(valid.astype(np.uint16)).astype(int)
    return tuple(valid[empty == count] for count in range(CELLS + 1))


def make_puzzles(
    solutions: Sequence[str], count: int, min_empty: int, max_empty: int, seed: int
) -> list[Example]:
    """Make `count` different puzzles with one solution each: {puzzle, solution} texts of 16 digits.

    The solution is uniform on `solutions`, the number of empty cells on min_empty..max_empty, the
    cells on what leaves one solution. Raises ValueError where there are fewer than `count`.
    """
    rng = np.random.default_rng(seed)
    available = sum(
        len(_clue_sets_by_empty(solution)[empty])
        for solution in solutions
        for empty in range(min_empty, max_empty + 1)
    )
    # drawing without repetition gets slow near the end of the supply
    if count > available // 2:
        raise ValueError(
            f"{count} puzzles were asked for, but only {available} with {min_empty} to {max_empty} "
            f"empty cells exist for these solutions; ask for at most {available // 2}"
        )
    puzzles: dict[str, Example] = {}
    while len(puzzles) < count:
        which = rng.integers(len(solutions), size=count)
        empties = rng.integers(min_empty, max_empty + 1, size=count)
        picks = rng.random(count)
        for solution, empty, pick in zip((solutions[w] for w in which), empties, picks, strict=True):
            choices = _clue_sets_by_empty(solution)[empty]
            if len(choices) == 0:
                continue
            clues = int(choices[int(pick * len(choices))])
            puzzle = "".join(d if clues >> i & 1 else "0" for i, d in enumerate(solution))
            if puzzle not in FEW_SHOT:
                puzzles.setdefault(puzzle, {"puzzle": puzzle, "solution": solution})
    return list(puzzles.values())[:count]


def split_of(solution: str) -> str:
    """Return the split that a solution belongs to: train, validation or test."""
    if solution not in HELD_OUT:
        return "train"
    return ("validation", "test")[HELD_OUT.index(solution) % 2]


def solutions_of(split: str) -> list[str]:
    """Return the solved grids of `split`: 200 for train, 44 for validation, 44 for test."""
    return [grid for grid in all_grids() if split_of(grid) == split]


def read_puzzles(path: str | Path) -> list[Example]:
    """Read puzzles from a CSV with the columns Puzzle and Solution.

    Raises ValueError, naming the line, where a row is no puzzle with its solution.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"task.path={path} is no file; give a CSV with the columns Puzzle,Solution")
    grids = set(all_grids())
    rows: list[Example] = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"Puzzle", "Solution"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; needed: Puzzle,Solution")
        for number, row in enumerate(reader, start=2):
            puzzle, solution = row["Puzzle"] or "", row["Solution"] or ""
            fits = len(puzzle) == CELLS and all(p in ("0", s) for p, s in zip(puzzle, solution, strict=False))
            if solution not in grids or not fits or "0" not in puzzle:
                raise ValueError(
                    f"{path}, line {number}: {puzzle!r} with {solution!r} is no 4x4 Sudoku with its "
                    "solution; expected 16 digits each, 0 for an empty cell"
                )
            rows.append({"puzzle": puzzle, "solution": solution})
    return rows


def _after(cell: int) -> str:
    """Return what a template writes after a cell: a line for each row, a space between the boxes."""
    return "\n" if cell % 4 == 3 else " " if cell % 4 == 1 else ""


class Sudoku:
    """Fill a 4x4 grid so that each row, column and 2x2 box holds 1 to 4 once (paper, G.1).

    format: `template` gives the grid with its clues in place, four lines with a space between the
    boxes (24 tokens where each character is one), and only empty cells are decoded; `completion`
    asks for all 16 digits after the puzzle, as in the paper.
    reward: `intended` is the fraction of empty cells filled as in the solution, 0 if a clue was
    changed; `released` is the published one, blind to changed clues; `rules` is 0 if a clue was
    changed or the grid is not 16 digits, else the fraction of empty cells whose digit is in range
    and unlike every other in its row, column and box: 1 for any valid completion.
    parser: `exact` reads a completion in the form that was asked for; `d1` and `spg`, which are one,
    look for a grid as these projects' evaluations do.
    prompt_style: `bare` shows the puzzle alone, for models trained on this task; `instruct` is a chat
    with the rules, `shots` worked examples and the answer tags, for instruction-tuned models, whose
    text prompt_file may replace.
    path: CSV with the columns Puzzle,Solution. Its rows go to the split of their solution; a split
    that it has no rows for is generated. min_empty, max_empty, train_size, eval_size and data_seed
    shape the generated puzzles. Raises ValueError for values out of range.
    """

    name = "sudoku"
    workers = 1
    # for the configuration check: see spg.config.parts
    ordered = (("min_empty", "max_empty"),)

    def __init__(
        self,
        format: str = "template",
        reward: str = "intended",
        parser: str = "exact",
        prompt_style: str = "bare",
        prompt_file: str | None = None,
        shots: int = 0,
        path: str | None = None,
        min_empty: int = 4,
        max_empty: int = 12,
        train_size: int = 20000,
        eval_size: int = 256,
        data_seed: int = 0,
    ) -> None:
        check_limits(format=format, prompt_style=prompt_style, shots=shots)
        check_limits(min_empty=min_empty, max_empty=max_empty)
        check_limits(train_size=train_size, eval_size=eval_size, data_seed=data_seed)
        if min_empty > max_empty:
            raise ValueError(f"min_empty={min_empty} is above max_empty={max_empty}")
        check_generated(eval_size)
        check_choices(self.name, reward=(reward, REWARDS), parser=(parser, PARSERS))
        if prompt_file is not None and prompt_style != "instruct":
            raise InputError(
                "task.prompt_file holds chats; set task.prompt_style=instruct with it, or leave it out"
            )
        self.format = format
        self.reward_name = reward
        self.parser = parser
        self.prompt_style = prompt_style
        self.prompts = None if prompt_file is None else PromptFile(prompt_file, ("puzzle",))
        self.shots = shots
        self.empty = (min_empty, max_empty)
        self.sizes = {"train": train_size, "validation": eval_size, "test": eval_size}
        self.data_seed = data_seed
        self.rows = read_puzzles(path) if path is not None else []
        self._examples: dict[str, list[Example]] = {}

    def examples(self, split: str) -> Sequence[Example]:
        if split == "heldout":
            return [*self.examples("validation"), *self.examples("test")]
        if split not in SPLITS:
            raise InputError(f"split={split!r} is unknown; allowed: {', '.join(SPLITS)}")
        if split not in self._examples:
            self._examples[split] = self._load(split)
        return self._examples[split]

    def _load(self, split: str) -> list[Example]:
        given = [row for row in self.rows if split_of(row["solution"]) == split]
        given = [row for row in given if row["puzzle"] not in FEW_SHOT]
        if given:
            return given
        seed = 3 * self.data_seed + SPLITS.index(split)
        return make_puzzles(solutions_of(split), self.sizes[split], *self.empty, seed)

    def prompt(self, example: Example) -> str | Chat:
        if self.prompts is not None:
            return self.prompts(example)
        if self.prompt_style == "instruct":
            return instruct_prompt(example["puzzle"], self.shots)
        return "<answer>" if self.format == "template" else example["puzzle"] + "<answer>"

    def demonstrations(self) -> Sequence[Example]:
        return self.examples("train")

    def template(self, example: Example) -> Template | None:
        if self.format == "completion":
            return None
        opening, closing = ("<answer>\n", "</answer>") if self.prompt_style == "instruct" else ("", "")
        parts: list[str | int] = [opening]
        for cell, digit in enumerate(example["puzzle"]):
            parts += [1 if digit == "0" else digit, _after(cell)]
        return tuple(part for part in [*parts, closing] if part)

    def target(self, example: Example) -> str:
        if self.format == "template":
            grid = "".join(digit + _after(cell) for cell, digit in enumerate(example["solution"]))
        else:
            grid = example["solution"]
        return f"<answer>\n{grid}</answer>" if self.prompt_style == "instruct" else grid

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        if self.reward_name == "released":
            return {"cells": cells(example, self._released_answer(completion))}
        answer = self._exact_answer(completion)
        if self.reward_name == "rules":
            return {"rules": rules(example, answer)}
        # a template gives the clues: there, only a text that is shifted could seem to change one
        kept = self.format == "template" or clues_intact(example, answer)
        return {"cells": cells(example, answer) if kept else 0.0}

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return accuracy (fraction of empty cells right), solved and clues intact (0 or 1 each)."""
        answer = self._read(completion)
        return {
            "accuracy": cells(example, answer),
            "solved": float(answer == example["solution"]),
            "clues_intact": float(clues_intact(example, answer.ljust(CELLS))),
        }

    def answer(self, example: Example, completion: str) -> str | None:
        return self._read(completion) or None

    def _read(self, completion: str) -> str:
        return self._exact_answer(completion) if self.parser == "exact" else published_grid(completion)

    def _exact_answer(self, completion: str) -> str:
        """Return the 16 cells that a completion answers with.

        Instructed models answer between the last answer tags; from them and from a free completion
        the digits are taken. In a bare template a cell's place is known: `?` stands for one that
        holds no digit, and the others stay in place.
        """
        if self.prompt_style == "instruct":
            head, _, _ = completion.rpartition(CLOSE)
            completion = head.rpartition(OPEN)[2] if OPEN in head else ""
        elif self.format == "template":
            characters = TAG.sub("?", completion)
            places = (6 * (cell // 4) + cell % 4 + (cell % 4 > 1) for cell in range(CELLS))
            found = [characters[p : p + 1] for p in places]
            return "".join(c if c.isdigit() else "?" for c in found if c)
        return _digits(completion)

    def _released_answer(self, completion: str) -> str:
        """Return the digits between the last pair of tags, as the authors' reward reads them."""
        if self.prompt_style == "instruct":
            return _digits(last_answer(completion) or "")
        return self._exact_answer(completion)

    def example_of(self, record: Mapping[str, Any]) -> Example:
        row = record.get("example")
        if row is None:
            question = str(record.get("question", ""))
            found = QUESTION.search(question)
            puzzle = found[1] if found and not PUZZLE.match(question) else question[:CELLS]
            row = {"puzzle": puzzle, "solution": record.get("ground_truth")}
        if not isinstance(row, Mapping) or not all(
            isinstance(row.get(grid), str) and PUZZLE.fullmatch(row[grid]) for grid in ("puzzle", "solution")
        ):
            raise InputError(
                "a saved completion of sudoku needs `example` {puzzle, solution}, or `question` with the "
                f"puzzle and `ground_truth`, in 16 digits each; the line has {', '.join(map(str, record))}"
            )
        return {"puzzle": row["puzzle"], "solution": row["solution"]}


def _digits(text: str) -> str:
    return "".join(c for c in text if c.isdigit())


def published_grid(completion: str) -> str:
    """Return the 16 characters that the evaluations of d1 and SPG take for the grid, "" where they find none.

    Looked for in turn: digits in a code block behind an opening answer tag; what stands in the first tags;
    behind them; 16 digits before a closing tag; 16 digits alone.
    """
    _, opened, inside = completion.partition(OPEN)
    _, closed, behind = completion.partition(CLOSE)
    fenced = FENCED.search(inside)
    # an end of text ends an answer as a tag does
    ended = opened and (CLOSE in inside or END.search(inside))
    found = (
        fenced[1] if fenced else "",
        END.split(inside.partition(CLOSE)[0], maxsplit=1)[0] if ended else "",
        END.split(behind, maxsplit=1)[0] if closed else "",
        *(match[1] for pattern in (CLOSED, ALONE) if (match := pattern.search(completion))),
    )
    grid = "".join(next((text for text in found if text.strip()), "").split())
    return grid[:CELLS].ljust(CELLS, "0") if grid else ""


def clues_intact(example: Example, answer: str) -> bool:
    """Return whether none of the clues that an answer, which may be cut off, gets to is changed."""
    return all(p in ("0", a) for p, a in zip(example["puzzle"], answer, strict=False))


def cells(example: Example, answer: str) -> float:
    """Return the fraction of empty cells filled as in the solution; 0 for a puzzle without any."""
    empty = [i for i, digit in enumerate(example["puzzle"]) if digit == "0"]
    right = sum(answer[i : i + 1] == example["solution"][i] for i in empty)
    return right / len(empty) if empty else 0.0


def rules(example: Example, answer: str) -> float:
    """Return the fraction of empty cells that break no rule; 0 if clues or length are wrong."""
    puzzle = example["puzzle"]
    if len(answer) != CELLS or any(p not in ("0", a) for p, a in zip(puzzle, answer, strict=True)):
        return 0.0
    empty = [i for i, digit in enumerate(puzzle) if digit == "0"]
    kept = sum(answer[i] in "1234" and all(answer[i] != answer[j] for j in PEERS[i]) for i in empty)
    return kept / len(empty) if empty else 0.0


def instruct_prompt(puzzle: str, shots: int) -> Chat:
    """Return a chat that states the rules and the answer's form, with 0 to 3 worked examples."""
    text = (
        "Complete a 4x4 Sudoku. The puzzle comes as 16 digits, row after row, with 0 for each empty "
        "cell. Replace every 0 by a digit from 1 to 4 so that no digit appears twice in a row, in a "
        "column or in one of the four 2x2 corner boxes. Digits that are already there must stay.\n"
        "Think inside <reasoning> and </reasoning>. Then write the finished grid, 16 digits without "
        "spaces, between <answer> and </answer>.\n"
    )
    for number, shot in enumerate(FEW_SHOT[:shots], start=1):
        text += f"\nExample {number}\nPuzzle: {shot}\n{worked_example(shot)}\n"
    return [{"role": "user", "content": f"{text}\nPuzzle: {puzzle}\n"}]


def worked_example(puzzle: str) -> str:
    """Solve a puzzle cell by cell, always the first cell that only one digit fits, and say so.

    Raises ValueError where the puzzle cannot be solved in this way.
    """
    grid, lines = puzzle, []
    while "0" in grid:
        for cell in (i for i, digit in enumerate(grid) if digit == "0"):
            left = set("1234") - {grid[j] for j in PEERS[cell]}
            if len(left) == 1:
                break
        else:
            raise ValueError(f"{puzzle} has no cell that a single digit fits at {grid}")
        digit = left.pop()
        grid = grid[:cell] + digit + grid[cell + 1 :]
        lines.append(f"Row {cell // 4 + 1}, column {cell % 4 + 1}: only {digit} fits.")
    return "<reasoning>\n" + "\n".join(lines) + f"\n</reasoning>\n<answer>\n{grid}\n</answer>"
