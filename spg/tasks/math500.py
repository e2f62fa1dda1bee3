"""MATH500: competition problems with answers in LaTeX (paper, G.1); rewards and parsers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spg.core.errors import InputError
from spg.core.examples import Example
from spg.tasks.datasets import Published
from spg.tasks.parsing.latex import SLIP, box_content, boxed_in_answer, is_equiv, last_boxed
from spg.tasks.parsing.tags import first_answer
from spg.tasks.question_answering import Questions, are_equal, as_text, final_answer, format_completion


class Math500(Questions):
    r"""Problems whose answers are expressions; see `Questions` for the parameters.

    The reward has two parts: `correctness` 2.0 for the right answer in a box, and `format`: 1 for a box
    between answer tags, 0.75 for tags, 0.5 for a box, 0.25 for neither. `intended` also accepts expressions
    that are equal by math-verify. `released` looks for a misspelt box in the format, takes the text after
    "\boxed " (or a whole text without a box) for the answer, and compares by the rule of the data set only.

    The parsers `d1` and `spg` are the same: the last box, else the first answer tags, compared by that
    rule. Rows have the column problem, and solution or (for the final answer only) answer.
    """

    name = "math500"
    train = Published("ankner/math-500", "train", ("problem",))
    heldout = Published("ankner/math-500", "test", ("problem",))
    column = "problem"
    instruction = "Solve a mathematical problem. Give the answer exactly, in LaTeX."
    worked = (
        (
            "Find the sum of the solutions of $x^2 - 7x + 10 = 0$.",
            format_completion(
                "The left side is (x - 2)(x - 5), so x is 2 or 5.\nTheir sum is 2 + 5 = 7.", "7"
            ),
        ),
        (
            "A fair die is thrown twice. What is the probability of two equal numbers?",
            format_completion(
                "There are 36 outcomes, and 6 with equal numbers.\nThe probability is 6/36 = 1/6.",
                r"\frac{1}{6}",
            ),
        ),
        (
            "A square has an area of 12. How long is its side?",
            format_completion(
                "The side is the root of 12, and 12 = 4 * 3.\nSo it is 2 times the root of 3.", r"2\sqrt{3}"
            ),
        ),
    )

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Return the example of a row; raise InputError if it has no answer."""
        columns = ("problem", "solution", "answer")
        # the number 0 is an answer
        example = {name: as_text(row[name]) for name in columns if row.get(name) not in (None, "")}
        if _true_answer(example) is None:
            raise InputError(
                f"{where}: no answer in the columns {', '.join(map(str, row))}; "
                r"expected `answer`, or `solution` with the answer in its last \boxed{...}"
            )
        return example

    def target(self, example: Example) -> str:
        """Return the solution of the data set in the published form."""
        truth = _true_answer(example) or ""
        return format_completion(example.get("solution", truth), truth)

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the two parts of the reward."""
        if self.reward_name == "released":
            answer = last_boxed(completion)
            right = is_equiv(completion if answer is None else answer, _released_answer(example))
            return {"correctness": 2.0 * right, "format": boxed_in_answer(completion, SLIP)}
        answer, truth = box_content(completion), _true_answer(example)
        right = answer is not None and truth is not None and are_equal(truth, answer)
        return {"correctness": 2.0 * right, "format": boxed_in_answer(completion)}

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the answer that the parser finds, or None."""
        if self.parser == "math_verify":
            return final_answer(completion)
        boxed = last_boxed(completion)
        tagged = None if boxed else first_answer(completion)
        return boxed if tagged is None else tagged

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return `accuracy`, and `parsed`: whether an answer was found."""
        answer, truth = self.answer(example, completion), _true_answer(example)
        same = are_equal if self.parser == "math_verify" else is_equiv
        right = answer is not None and truth is not None and same(truth, answer)
        return {"accuracy": float(right), "parsed": float(answer is not None)}


def _true_answer(example: Example) -> str | None:
    r"""Return the final answer of a problem: `answer`, or the content of the last box of `solution`."""
    if example.get("answer") is not None:
        return example["answer"]
    return box_content(example.get("solution", "")) or None


def _released_answer(example: Example) -> str | None:
    """Return the answer as the released reward reads it, or None if that fails."""
    return last_boxed(example["solution"]) if "solution" in example else example["answer"]
