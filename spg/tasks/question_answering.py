"""What tasks of published questions, each with one answer, share: data, prompts, the robust parser."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.rules import Count, checked
from spg.tasks.base import BaseTask, Shots
from spg.tasks.datasets import Published, files_of, load
from spg.tasks.parsing.latex import box_content, is_equiv
from spg.tasks.parsing.math_verify import verify
from spg.tasks.parsing.tags import CLOSE, OPEN
from spg.tasks.prompts import PromptFile, instruct

log = logging.getLogger(__name__)

# what a tokenizer may leave in a text at the completion's end
ENDS = ("<|eot_id|>", "<|endoftext|>")
# rows of a file of training rows alone that are held out, at most a quarter of it
HELD_OUT = 512
UNBOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class Questions(BaseTask):
    """Questions in words, answered freely; a subclass names the data and owns rewards and correctness.

    reward: `intended`, or `released`, which is the authors' number for number. parser: `math_verify`, or `d1`
    or `spg`, the rules of these projects' evaluations. path: file or folder with held-out rows, train_path:
    with training rows (a folder at `path` may hold both); without, the published data from the hub. A file at
    `path` that is named as the training split serves for both: its last `HELD_OUT` rows, at most a quarter,
    are held out, whatever else is set. eval_size: held-out rows of each half that are used, None for all.
    prompt_file: prompts of another code base. shots: worked examples in a prompt. Raises ValueError for
    values out of range.
    """

    name: str
    train: Published
    heldout: Published
    column: str  # what the data set calls a question
    instruction: str
    worked: tuple[tuple[str, str], ...]  # questions and completions of our own

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
            # both ways, where neither is taken yet: else the held-out rows would be missed next
            neither = path is None and folder is None
            both = "task.path=<folder with train.* and test.*> or task.train_path"
            rows = load(self.train, path, both if neither else "task.train_path")
        if source == "heldout" and self.eval_size is not None:
            rows = rows[: 2 * self.eval_size]
        return [
            self.example(row, f"{self.name}, {source}, row {n}") for n, row in enumerate(rows, start=first)
        ]

    def _serves_both(self) -> bool:
        """Return whether `path` is a file of training rows, by its name, and no others are given."""
        file = None if self.path is None or self.train_path is not None else Path(self.path)
        return file is not None and file.is_file() and file in files_of(file.parent, self.train.split)

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Return the example that a row is; raises InputError, naming `where`, if it has no answer."""
        raise NotImplementedError

    def prompt(self, example: Example) -> str | Chat:
        """Return the chat of `prompt_file`, or one that asks for the answer between answer tags.

        It is asked for in a box, unless the reward gives nothing for one.
        """
        if self.prompts is not None:
            return self.prompts(example)
        if self.boxes():
            what, worked = r"only the final answer, in \boxed{}", self.worked
        else:
            what = "only the final answer"
            worked = tuple((asked, UNBOXED.sub(r"\1", told)) for asked, told in self.worked)
        return instruct(self.instruction, what, example[self.column], worked[: self.shots])

    def boxes(self) -> bool:
        r"""Return whether answers belong in \boxed{}."""
        return True

    def demonstrations(self) -> Sequence[Example]:
        return self.examples("train")

    def template(self, example: Example) -> Template | None:
        """Return None: completions are free."""
        return None

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example that a line of saved generations tells of; raises InputError without one."""
        where = f"a saved completion of {self.name}"
        row = record.get("example")
        if row is None and isinstance(record.get("question"), str) and "ground_truth" in record:
            truth = record["ground_truth"]
            row = {self.column: record["question"], "answer": None if truth is None else as_text(truth)}
        if isinstance(row, Mapping) and isinstance(row.get(self.column), str):
            # two of d1's lines know no answer; they count, and nothing is right
            return row if row.get("answer", "") is None else self.example(row, where)
        raise InputError(
            f"{where} needs `example` with `{self.column}`, or `question` and `ground_truth`; "
            f"the line has {', '.join(map(str, record))}"
        )


def as_text(value: Any) -> str:
    """Return a value as text, numbers of whole value as the data sets write them."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def format_completion(reasoning: str, answer: str) -> str:
    """Return a completion in the published form."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>\n"


def final_answer(completion: str) -> str | None:
    r"""Return the answer that a completion ends in, whatever its form; None where it gives none.

    That is what follows the last opening answer tag, its last box if there is one, even a spoilt one as
    "\boxed{36>"; without such a tag or with nothing behind it, the last \boxed{...} of the text.
    """
    _, opened, inside = completion.rpartition(OPEN)
    for end in (CLOSE, *ENDS):
        inside = inside.partition(end)[0]
    inside = inside.strip() if opened else ""
    return box_content(inside) or _unboxed(inside) or box_content(completion) or None


def _unboxed(text: str) -> str:
    """Return a text without a box that does not close, or that has lost its backslash."""
    _, spoilt, content = text.rpartition("boxed{")
    if spoilt:
        content = content.rstrip("> ")
        if content.count("}") > content.count("{"):
            content = content.rpartition("}")[0]
    return content.strip()


def are_equal(gold: str, answer: str) -> bool:
    """Return whether two answers are the same as text or by math-verify; False where that takes too long."""
    return is_equiv(gold, answer) or verify(gold, answer)
