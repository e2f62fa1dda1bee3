"""GSM8K: word problems of grade-school arithmetic (paper, G.1); rewards and parsers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from spg.core.errors import InputError
from spg.core.examples import Example
from spg.tasks.datasets import Published
from spg.tasks.parsing.latex import box_content
from spg.tasks.parsing.tags import CLOSE, OPEN, first_answer
from spg.tasks.question_answering import Questions, are_equal, as_text, final_answer, format_completion

COLUMNS = ("question", "answer")
BOXED = re.compile(r"\\boxed\{([^}]*)\}")
NUMBER = re.compile(r"-?\d+\.?\d*")
# a bare number, without separators and units
PLAIN = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)")
DECORATION = re.compile(r"[,\s]|\\?[$%]")
CALCULATION = re.compile(r"<<[^<>]*>>")  # notes for a calculator in the solutions of the data set

# the tags that the XML part counts, and the text between reasoning and answer
TAGS = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
BETWEEN = re.compile(r"</reasoning>\s*+<answer>")


class GSM8K(Questions):
    r"""Questions whose answers are numbers; see `Questions` for the parameters.

    The reward has five parts: `xml` (0.125 for each right tag, minus 0.001 for each character after the
    closing one), `soft_format` 0.5, `strict_format` 0.5, `integer` 0.5, and `correctness` 2.0. This is
    `intended`. `released` differs: the XML part also counts the characters of the answer, a format cannot
    span lines, an integer has only digits, and the answer must be the same text as that of the solution,
    without a box.

    The parser `d1` takes the first number in a box, else the last one in answer tags. `spg` also looks
    after an unclosed tag, and in the whole text. Both read 1,080 as the numbers 1 and 80, as published.
    """

    name = "gsm8k"
    train = Published("openai/gsm8k", "train", COLUMNS, "main")
    heldout = Published("openai/gsm8k", "test", COLUMNS, "main")
    column = "question"
    instruction = "Solve a word problem. The answer is one number, without its unit."
    worked = (
        (
            "A baker fills 4 trays with 6 rolls each and sells all but 5 rolls. How many rolls are sold?",
            format_completion("4 trays of 6 rolls are 4 * 6 = 24 rolls.\n24 - 5 = 19 rolls are sold.", "19"),
        ),
        (
            "Tickets cost $8, half as much for children. What do 2 adults and 3 children pay, in dollars?",
            format_completion("A child pays 8 / 2 = 4 dollars.\n2 * 8 + 3 * 4 = 16 + 12 = 28.", "28"),
        ),
        (
            "A tank of 120 litres is 25% full. How many litres go in until it is full?",
            format_completion("It holds 120 * 25 / 100 = 30 litres.\n120 - 30 = 90 litres go in.", "90"),
        ),
    )

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Return the example of a row; raise InputError if its answer ends in no number."""
        example = {column: None if row.get(column) is None else as_text(row[column]) for column in COLUMNS}
        if _number(_true_answer(example) or "") is None:
            raise InputError(
                f"{where}: the answer {example['answer']!r} ends in no number; "
                "expected a number, or a solution with `#### number` at its end"
            )
        return example

    def boxes(self) -> bool:
        r"""Return whether answers belong in \boxed{}: the released reward knows only bare answers."""
        return self.reward_name != "released"

    def target(self, example: Example) -> str:
        """Return the solution of the data set in the published form."""
        worked, _, _ = example["answer"].partition("####")
        return format_completion(CALCULATION.sub("", worked).strip(), _true_answer(example) or "")

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return the five parts of the reward."""
        truth = _true_answer(example)
        answer = completion.rpartition(OPEN)[2].partition(CLOSE)[0].strip()
        if self.reward_name == "released":
            counted, one_line = _tags(completion) - _characters_behind_tags(completion), True
            integer, right = answer.isdigit(), answer == truth
        else:
            counted, one_line = _tags(completion) - _characters_behind(completion), False
            number = _number(answer)
            integer = number is not None and number.denominator == 1
            right = number is not None and truth is not None and number == _number(truth)
        return {
            "xml": counted,
            "soft_format": 0.5 * _soft_format(completion, one_line),
            "strict_format": 0.5 * _strict_format(completion, one_line),
            "integer": 0.5 * integer,
            "correctness": 2.0 * right,
        }

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the answer that the parser finds, or None."""
        if self.parser == "math_verify":
            return final_answer(completion)
        number = published_number(completion, self.parser)
        return None if number is None else repr(number)

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return `accuracy`, and `parsed`: whether an answer was found."""
        answer, truth = self.answer(example, completion), _plain(_true_answer(example) or "")
        if answer is None or truth is None:
            right = False
        elif self.parser == "math_verify":
            right = are_equal(truth, answer)
        else:
            right = float(answer) == float(truth)
        return {"accuracy": float(right), "parsed": float(answer is not None)}


def _true_answer(example: Example) -> str | None:
    """Return the final answer of a question as in its solution; None if saved generations have none."""
    answer = example["answer"]
    if answer is None:
        return None
    _, marked, after = answer.partition("####")
    return (after.partition("####")[0] if marked else answer).strip()


def _plain(text: str) -> str | None:
    """Return a text that is a number, bare or boxed, without separators, dollars and per cent; else None."""
    content = box_content(text)
    plain = DECORATION.sub("", text if content is None else content).rstrip(".")
    # longer texts are not answers, and slow to read
    return plain if len(plain) <= 1000 and PLAIN.fullmatch(plain) else None


def _number(text: str) -> Fraction | None:
    plain = _plain(text)
    return None if plain is None else Fraction(plain)


def published_number(completion: str, parser: str) -> float | None:
    r"""Return the number that the evaluation of d1 or of SPG reads in a completion, or None if it finds none.

    The first box with a number counts; a box ends at its first }. Else it is the first answer. For `spg` it
    is else the text after the last opening tag, or the whole text.
    """
    for line in completion.split("\n"):
        # up to its last }, the search of a line takes time linear in its length
        for content in BOXED.findall(line[: line.rfind("}") + 1]):
            number = _float(content, 0)
            if number is not None:
                return number
    number = _float(first_answer(completion) or "", -1)
    if number is None and parser == "spg":
        number = _float(completion.rpartition(OPEN)[2].partition(CLOSE)[0], -1)
    return number


def _float(text: str, which: int) -> float | None:
    """Return a text as Python reads a float, `nan` and `1_0` included, else its first or last number."""
    try:
        return float(text.strip())
    except ValueError:
        numbers = NUMBER.findall(text)
        return float(numbers[which]) if numbers else None


def _tags(text: str) -> float:
    return sum(0.125 for tag in TAGS if text.count(tag) == 1)


def _characters_behind(text: str) -> float:
    """Return the deduction of the XML part, for the text after the closing tag and its new line."""
    _, *behind = text.split(TAGS[3])
    return 0.001 * len(behind[0].removeprefix("\n")) if len(behind) == 1 else 0.0


def _characters_behind_tags(text: str) -> float:
    """Return the deduction of the released XML part, which counts the answer too."""
    opened, closed = (text.split(tag)[1:] for tag in TAGS[2:])
    taken = 0.001 * len(opened[0]) if len(opened) == 1 else 0.0
    return taken + (0.001 * (len(closed[0]) - 1) if len(closed) == 1 else 0.0)


def _soft_format(text: str, one_line: bool) -> bool:
    """Return whether reasoning and answer follow each other; one_line: neither may hold a newline."""
    if not text.startswith("<reasoning>"):
        return False
    end = text.find("\n") if one_line and "\n" in text else len(text)
    passages = [m.end() for m in BETWEEN.finditer(text, len("<reasoning>")) if m.start() < end]
    # where the answer's line does not end in a tag for the first passage, it can only do so for one that
    # leads to another line, which is the last
    answers = [text[passage:] for passage in (passages[:1] + passages[-1:])]
    return any(CLOSE in (answer.partition("\n")[0] if one_line else answer) for answer in answers)


def _strict_format(text: str, one_line: bool) -> bool:
    """Return whether a text is the two parts, each tag on a line; one_line: each part, and a last newline."""
    if one_line:
        lines = text.split("\n")
        form = ["<reasoning>", *lines[1:2], "</reasoning>", "<answer>", *lines[4:5], "</answer>", ""]
        return lines in (form, [*form, ""])
    if not text.startswith(TAGS[0]):
        return False
    _, between, answer = text.removeprefix(TAGS[0]).partition("\n</reasoning>\n<answer>\n")
    return bool(between) and answer.rstrip("\n").endswith("\n</answer>")
