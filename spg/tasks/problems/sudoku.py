"""4x4 Sudoku puzzles: all grids, their split, puzzles with one solution, and puzzles from files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from spg.core.examples import Example

CELLS = 16

# the 88 solutions of the paper's test puzzles; the other 200 grids are for training
HELD_OUT = tuple(
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

# the puzzles of the few-shot prompts are in no split; their solutions are on the training side
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

    A clue set fails if and only if some other grid agrees with the solution on all its cells. So failure
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
    """Make different puzzles that have one solution each.

    The solution is uniform on `solutions`, the number of empty cells on min_empty to max_empty, and the set
    of empty cells on those that leave one solution.

    Args:
        solutions: Solved grids to choose from.
        count: Number of puzzles.
        min_empty: Fewest empty cells.
        max_empty: Most empty cells.
        seed: Seed of the generator.

    Returns:
        Examples {puzzle, solution}, texts of 16 digits with 0 for an empty cell.

    Raises:
        ValueError: if fewer than twice as many puzzles exist.
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
    """Return the split of a solution: train, validation or test."""
    if solution not in HELD_OUT:
        return "train"
    return ("validation", "test")[HELD_OUT.index(solution) % 2]


def solutions_of(split: str) -> list[str]:
    """Return the solved grids of `split`: 200 for train, 44 for validation, 44 for test."""
    return [grid for grid in all_grids() if split_of(grid) == split]


def read_puzzles(path: str | Path) -> list[Example]:
    """Read puzzles from a CSV file with the columns Puzzle and Solution.

    Raises:
        ValueError: if the file cannot be used; the message names the line that is not a puzzle with its
            solution.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"task.path={path} is not a file; give a CSV with the columns Puzzle,Solution")
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
