"""What tasks with published questions and one answer each share: data, prompts, the robust parser."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spg.core.errors import InputError
from spg.core.examples import Chat, Example
from spg.core.rules import Count, checked
from spg.tasks.base import BaseTask, Shots
from spg.tasks.datasets import Published, check_place, files_of, load
from spg.tasks.parsing.latex import box_content, is_equiv
from spg.tasks.parsing.math_verify import verify
from spg.tasks.parsing.tags import CLOSE, OPEN
from spg.tasks.prompts import PromptFile, instruct

log = logging.getLogger(__name__)

# end-of-text tokens that may be left in the text of a completion
ENDS = ("<|eot_id|>", "<|endoftext|>")
# rows that are held out of a file with training rows only, at most a quarter of it
HELD_OUT = 512
UNBOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class Questions(BaseTask):
    """Questions in words with free answers. A subclass has the data, the rewards and the comparison.

    Without `path` and `train_path` the published data come from the hub. A file at `path` with the name of
    the training split serves both purposes: its last `HELD_OUT` rows, at most a quarter, are held out,
    whatever the other parameters are.

    Args:
        reward: `intended`, or `released`, which equals the authors' reward number for number.
        parser: `math_verify`, or `d1` or `spg`, the rules of the evaluations of these projects.
        path: File with held-out rows, or a folder with held-out and maybe training rows.
        train_path: File or folder with training rows.
        prompt_file: File with the prompts of another code base.
        shots: Number of worked examples in a prompt.
        eval_size: Number of held-out rows of each half that are used; None uses all.

    Raises:
        ValueError: for values that are not allowed.
    """

    name: str
    train: Published
    heldout: Published
    # for the configuration check: see spg.config.parts
    files = (("path",), ("train_path",), ("prompt_file",))
    column: str  # name of the question's column in the data set
    instruction: str
    worked: tuple[tuple[str, str], ...]  # (question, completion) pairs, written for this project

    @checked
    def __init__(
        self,
        reward: Literal["intended", "released"] = "intended",
        parser: Literal["math_verify", "d1", "spg"] = "math_verify",
        path: str | None = None,
        train_path: str | None = None,
        prompt_file: str | None = None,
        shots: Shots = 0,
        eval_size: Count | None = None,
    ) -> None:
        self.reward_name = reward
        self.parser = parser
        self.path = path
        self.train_path = train_path
        self.shots = shots
        self.eval_size = eval_size
        self.prompts = None if prompt_file is None else PromptFile(prompt_file, (self.column,))

    def load_rows(self, source: str) -> Sequence[Example]:
        """Return the rows of `train` or `heldout`, from files or the hub."""
        for option, given in (("task.path", self.path), ("task.train_path", self.train_path)):
            if given is not None:
                check_place(given, option)
        first = 1  # number of the first row in its file
        if self._serves_both():
            rows = load(self.train, self.path, "task.path")
            heldout = min(HELD_OUT, len(rows) // 4)
            cut = len(rows) - heldout
            if source == "heldout":
                log.info("%s: the last %d rows are held out, %d trained on", self.path, heldout, cut)
                rows, first = rows[cut:], cut + 1
            else:
                rows = rows[:cut]
        elif source == "heldout":
            rows = load(self.heldout, self.path, "task.path")
        else:
            path = self.train_path
            folder = None if self.path is None else Path(self.path)
            if path is None and folder is not None and folder.is_dir() and files_of(folder, self.train.split):
                path = self.path
            # name both options if neither is given: the held-out rows are missing too
            neither = path is None and folder is None
            both = "task.path=<folder with train.* and test.*> or task.train_path"
            rows = load(self.train, path, both if neither else "task.train_path")
        if source == "heldout" and self.eval_size is not None:
            rows = rows[: 2 * self.eval_size]
        return [
            self.example(row, f"{self.name}, {source}, row {n}") for n, row in enumerate(rows, start=first)
        ]

    def _serves_both(self) -> bool:
        """Return whether `path` is a file named as the training split, and no `train_path` is given."""
        file = None if self.path is None or self.train_path is not None else Path(self.path)
        return file is not None and file.is_file() and file in files_of(file.parent, self.train.split)

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Return the example of a row; raise InputError, with `where` in its message, if it has no answer."""
        raise NotImplementedError

    def prompt(self, example: Example) -> str | Chat:
        """Return the chat of `prompt_file`, or one that asks for the answer between answer tags.

        The answer belongs in a box, unless the reward gives nothing for a box.
        """
        if self.prompts is not None:
            return self.prompts(example)
        if self.boxes():
            what, worked = r"only the final answer, in \boxed{}", self.worked
        else:
            what = "only the final answer"
            worked = tuple((asked, UNBOXED.sub(r"\1", answered)) for asked, answered in self.worked)
        return instruct(self.instruction, what, example[self.column], worked[: self.shots])

    def boxes(self) -> bool:
        r"""Return whether answers belong in \boxed{}."""
        return True

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example of a saved completion.

        Raises:
            InputError: if the line has none.
        """
        where = f"a saved completion of {self.name}"
        row = record.get("example")
        if row is None and isinstance(record.get("question"), str) and "ground_truth" in record:
            truth = record["ground_truth"]
            row = {self.column: record["question"], "answer": None if truth is None else as_text(truth)}
        if isinstance(row, Mapping) and isinstance(row.get(self.column), str):
            # two lines of d1's files have no answer; they count, and no completion is right
            return row if row.get("answer", "") is None else self.example(row, where)
        raise InputError(
            f"{where} needs `example` with `{self.column}`, or `question` and `ground_truth`; "
            f"the line has {', '.join(map(str, record))}"
        )


def as_text(value: Any) -> str:
    """Return a value as text; a whole number has no decimal point, as in the data sets."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def format_completion(reasoning: str, answer: str) -> str:
    """Return a completion in the published form: reasoning, then a boxed answer."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>\n"


def final_answer(completion: str) -> str | None:
    r"""Return the final answer of a completion in any form, or None if there is none.

    It is the text after the last opening answer tag: the last box there, even a broken one such as
    "\boxed{36>". Without such a tag, or with nothing after it, it is the last \boxed{...} of the text.
    """
    _, opened, inside = completion.rpartition(OPEN)
    for end in (CLOSE, *ENDS):
        inside = inside.partition(end)[0]
    inside = inside.strip() if opened else ""
    return box_content(inside) or _unboxed(inside) or box_content(completion) or None


def _unboxed(text: str) -> str:
    """Return a text without a broken box: one that is not closed, or has lost its backslash."""
    _, spoilt, content = text.rpartition("boxed{")
    if spoilt:
        content = content.rstrip("> ")
        if content.count("}") > content.count("{"):
            content = content.rpartition("}")[0]
    return content.strip()


def are_equal(gold: str, answer: str) -> bool:
    """Return whether two answers are equal as text or by math-verify; False if that takes too long."""
    return is_equiv(gold, answer) or verify(gold, answer)
