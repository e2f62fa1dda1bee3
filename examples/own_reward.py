"""A reward of your own: a shipped task with another `reward`, trained for a few updates.

Run `python examples/own_reward.py`. It does the same as the command line in this folder:

    python -m spg.train -cd conf task=sudoku_rows experiment=quick

`conf/task/sudoku_rows.yaml` is the task `sudoku` with the class of this file. The first run makes base
weights for it by supervised training, in seconds.
"""

import sys
from pathlib import Path

from spg.core.examples import Example
from spg.tasks.sudoku import Sudoku

CONF = Path(__file__).parent / "conf"


class WholeRows(Sudoku):
    """Sudoku that pays for whole rows: the fraction of the four rows that are right."""

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the reward's parts for a completion; their sum is the reward."""
        answer, solution = self.answer(example, completion) or "", example["solution"]
        rows = [answer[start : start + 4] == solution[start : start + 4] for start in range(0, 16, 4)]
        return {"rows": sum(rows) / 4}


def main() -> None:
    """Train for eight updates, or as the command line says."""
    from spg.train import main as train

    sys.argv[1:] = ["-cd", str(CONF), "task=sudoku_rows", "experiment=quick", *sys.argv[1:]]
    train()


if __name__ == "__main__":
    main()
