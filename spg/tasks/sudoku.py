"""Sudoku 4x4: grids, puzzles with one solution, the paper's split by solution, rewards, parsers.

A grid is a text of 16 digits, row by row; 0 is an empty cell. Cells are numbered 0 to 15, and a set
of cells is a 16-bit mask with bit i for cell i.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Interval

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.rules import Count, CountOrZero, checked
from spg.tasks.base import SPLITS, BaseTask, GeneratedSize, PromptStyle, Shots, check_split
from spg.tasks.parsing.tags import CLOSE, OPEN, last_answer
from spg.tasks.problems.sudoku import (
    CELLS,
    FEW_SHOT,
    PEERS,
    make_puzzles,
    read_puzzles,
    solutions_of,
    split_of,
)
from spg.tasks.prompts import PromptFile

TAG = re.compile(r"</?(?:answer|reasoning)>")

# where the authors' evaluations look for a grid; the time of each search is linear in the length of the text
END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
FENCED = re.compile(r"```([\d\s]++)```")
CLOSED = re.compile(r"(\d{16})\s*+</answer>")
ALONE = re.compile(r"\b(\d{16})\b")
PUZZLE = re.compile(r"[0-9]{16}")
QUESTION = re.compile(r"Sudoku puzzle: ([0-9]{16})")


def _after(cell: int) -> str:
    """Return the separator after a cell in a template: a new line after a row, a space between the boxes."""
    return "\n" if cell % 4 == 3 else " " if cell % 4 == 1 else ""


EmptyCells = Annotated[int, Interval(ge=1, le=12)]


class Sudoku(BaseTask):
    """Fill a 4x4 grid so that each row, column and 2x2 box holds 1 to 4 once (paper, G.1).

    Args:
        format: `template` gives the grid with its clues in place, in four lines with a space between the
            boxes (24 tokens if each character is one), and only empty cells are decoded. `completion` asks
            for all 16 digits after the puzzle, as in the paper.
        reward: `intended` is the fraction of empty cells that are filled as in the solution, and 0 if a
            clue was changed. `released` is the published reward, which ignores changed clues. `rules` is 0
            if a clue was changed or the grid does not have 16 digits; else it is the fraction of empty
            cells whose digit is allowed and differs from all others in its row, column and box, so 1 for
            any valid grid.
        parser: `exact` reads a completion in the form that was asked for. `d1` and `spg`, which are the
            same, look for a grid as the evaluations of these projects do.
        prompt_style: `bare` shows the puzzle only, for models trained on this task. `instruct` is a chat
            with the rules, worked examples and the answer tags, for instruction-tuned models.
        prompt_file: File with an instruct prompt of another code base, with {puzzle}.
        shots: Number of worked examples in an instruct prompt.
        path: CSV file with the columns Puzzle,Solution. Its rows go to the split of their solution; a split
            without rows in the file is generated.
        min_empty: Fewest empty cells of a generated puzzle.
        max_empty: Most empty cells of a generated puzzle.
        train_size: Number of generated training puzzles.
        eval_size: Number of generated puzzles of each of validation and test.
        data_seed: Seed of the generated puzzles.

    Raises:
        ValueError: for values that are not allowed.
    """

    name = "sudoku"
    # for the configuration check: see spg.config.parts
    ordered = (("min_empty", "max_empty"),)
    files = (("path",), ("prompt_file",))

    @checked
    def __init__(
        self,
        format: Literal["template", "completion"] = "template",
        reward: Literal["intended", "released", "rules"] = "intended",
        parser: Literal["exact", "d1", "spg"] = "exact",
        prompt_style: PromptStyle = "bare",
        prompt_file: str | None = None,
        shots: Shots = 0,
        path: str | None = None,
        min_empty: EmptyCells = 4,
        max_empty: EmptyCells = 12,
        train_size: Count = 20000,
        eval_size: GeneratedSize = 256,
        data_seed: CountOrZero = 0,
    ) -> None:
        if min_empty > max_empty:
            raise ValueError(f"min_empty={min_empty} is above max_empty={max_empty}")
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
        """Return the examples of a split, from a file or generated."""
        if split == "heldout":
            return [*self.examples("validation"), *self.examples("test")]
        check_split(split)
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
        """Return the prompt in the style of the task, or that of `prompt_file`."""
        if self.prompts is not None:
            return self.prompts(example)
        if self.prompt_style == "instruct":
            return instruct_prompt(example["puzzle"], self.shots)
        return "<answer>" if self.format == "template" else example["puzzle"] + "<answer>"

    def template(self, example: Example) -> Template | None:
        """Return the grid with its clues in place, or None with format=completion."""
        if self.format == "completion":
            return None
        opening, closing = ("<answer>\n", "</answer>") if self.prompt_style == "instruct" else ("", "")
        parts: list[str | int] = [opening]
        for cell, digit in enumerate(example["puzzle"]):
            parts += [1 if digit == "0" else digit, _after(cell)]
        return tuple(part for part in [*parts, closing] if part)

    def target(self, example: Example) -> str:
        """Return the solved grid in the form that was asked for."""
        if self.format == "template":
            grid = "".join(digit + _after(cell) for cell, digit in enumerate(example["solution"]))
        else:
            grid = example["solution"]
        return f"<answer>\n{grid}</answer>" if self.prompt_style == "instruct" else grid

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the one part `cells` or `rules`."""
        if self.reward_name == "released":
            return {"cells": score_cells(example, self._released_answer(completion))}
        answer = self._exact_answer(completion)
        if self.reward_name == "rules":
            return {"rules": score_rules(example, answer)}
        # a template gives the clues, so only a shifted text could seem to change one
        kept = self.format == "template" or clues_intact(example, answer)
        return {"cells": score_cells(example, answer) if kept else 0.0}

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return `accuracy` (fraction of empty cells right), `solved` and `clues_intact` (0 or 1 each)."""
        answer = self._read(completion)
        return {
            "accuracy": score_cells(example, answer),
            "solved": float(answer == example["solution"]),
            "clues_intact": float(clues_intact(example, answer.ljust(CELLS))),
        }

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the digits that a completion answers with, or None if there are none."""
        return self._read(completion) or None

    def _read(self, completion: str) -> str:
        return self._exact_answer(completion) if self.parser == "exact" else published_grid(completion)

    def _exact_answer(self, completion: str) -> str:
        """Return the 16 cells that a completion answers with.

        Instructed models answer between the last answer tags. Their digits count, and those of a free
        completion. In a bare template the place of a cell is known: `?` stands for a cell without a digit.
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
        """Return the example of a saved completion, of this project or in the authors' format."""
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
    """Return the 16 characters that the evaluations of d1 and SPG take for the grid, or "" if they find none.

    They look in turn for digits in a code block after an opening answer tag, the content of the first tags,
    the text after them, 16 digits before a closing tag, and 16 digits alone.
    """
    _, opened, inside = completion.partition(OPEN)
    _, closed, behind = completion.partition(CLOSE)
    fenced = FENCED.search(inside)
    # an end-of-text token ends an answer as a tag does
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
    """Return whether an answer, which may be cut off, keeps all clues that it reaches."""
    return all(p in ("0", a) for p, a in zip(example["puzzle"], answer, strict=False))


def score_cells(example: Example, answer: str) -> float:
    """Return the fraction of empty cells that are filled as in the solution; 0 without empty cells."""
    empty = [i for i, digit in enumerate(example["puzzle"]) if digit == "0"]
    right = sum(answer[i : i + 1] == example["solution"][i] for i in empty)
    return right / len(empty) if empty else 0.0


def score_rules(example: Example, answer: str) -> float:
    """Return the fraction of empty cells that break no rule; 0 if a clue or the length is wrong."""
    puzzle = example["puzzle"]
    if len(answer) != CELLS or any(p not in ("0", a) for p, a in zip(puzzle, answer, strict=True)):
        return 0.0
    empty = [i for i, digit in enumerate(puzzle) if digit == "0"]
    kept = sum(answer[i] in "1234" and all(answer[i] != answer[j] for j in PEERS[i]) for i in empty)
    return kept / len(empty) if empty else 0.0


def instruct_prompt(puzzle: str, shots: int) -> Chat:
    """Return a chat with the rules, the form of the answer, and 0 to 3 worked examples."""
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
    """Return the solution of a puzzle in steps. Each step fills the first cell that only one digit fits.

    Raises:
        ValueError: if the puzzle cannot be solved in this way.
    """
    grid, lines = puzzle, []
    while "0" in grid:
        for cell in (i for i, digit in enumerate(grid) if digit == "0"):
            left = set("1234") - {grid[j] for j in PEERS[cell]}
            if len(left) == 1:
                break
        else:
            raise ValueError(f"{puzzle} has no cell that only one digit fits at {grid}")
        digit = left.pop()
        grid = grid[:cell] + digit + grid[cell + 1 :]
        lines.append(f"Row {cell // 4 + 1}, column {cell % 4 + 1}: only {digit} fits.")
    return "<reasoning>\n" + "\n".join(lines) + f"\n</reasoning>\n<answer>\n{grid}\n</answer>"
