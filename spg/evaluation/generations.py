"""generations.jsonl: completions, a line each, as an evaluation writes them and as others have saved them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spg.core.errors import InputError
from spg.evaluation.evaluator import Completion, Item, Result
from spg.tasks.base import Task

Line = dict[str, Any]
Key = tuple[str, int, int]

# where a line has its completion: in our own files, then in those of the authors' two programs
TEXT_KEYS = ("completion", "generation", "generations")
# what our own lines say of how a completion was made, null if it is not known
DECODING_KEYS = ("tokens", "decoded", "steps", "near_ties")


class Generations:
    """The file generations.jsonl of an evaluation: its whole lines, by (model, index, sample).

    What an interruption left of a line at the end is cut off.

    Args:
        path: The file; it need not exist yet.

    Raises:
        InputError: if a line before the end can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Key, Line] = {}
        if not path.is_file():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, text in enumerate(content[:whole].splitlines(), start=1):
            line = _parse(text.decode("utf-8", errors="replace"), f"{path}, line {number}")
            self.lines[line["model"], line["index"], line["sample"]] = line

    def add(self, lines: Sequence[Line]) -> None:
        """Append lines; they are on disk when this returns."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        # half a surrogate pair has no UTF-8; written with a backslash it is JSON for the same text
        content = text.encode("utf-8", errors="backslashreplace")
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.lines |= {(line["model"], line["index"], line["sample"]): line for line in lines}

    def has(self, model: str, item: Item) -> bool:
        """Return whether the file holds a model's completion of an item."""
        return (model, item.index, item.sample) in self.lines

    def of_model(self, model: str) -> list[Line]:
        """Return a model's lines, ordered by example and sample, whatever their order in the file."""
        return [self.lines[key] for key in sorted(self.lines) if key[0] == model]


def make_line(model: str, result: Result, answer: str | None) -> Line:
    """Return the line of a model's result.

    Args:
        model: Name of the model.
        result: The measured completion.
        answer: The answer that the task reads in the completion.
    """
    accuracy = result.measures["accuracy"]
    return {
        "model": model,
        "index": result.item.index,
        "sample": result.item.sample,
        "prompt": result.completion.prompt,
        "completion": result.completion.text,
        "answer": answer,
        "correct": bool(accuracy) if accuracy in (0, 1) else accuracy,
        "measures": dict(result.measures),
        **{key: getattr(result.completion, key) for key in DECODING_KEYS},
        "example": dict(result.item.example),
    }


def read_generations(path: Path, task: Task) -> dict[str, list[tuple[Item, Completion]]]:
    """Return the completions of a jsonl file by model, in the order of examples and samples.

    Our own lines have completion, example, model, index and sample. The authors' lines have question,
    ground_truth and a text, or a list of samples, under generation or generations: each line is one example,
    and there is one model, named as the file.

    Args:
        path: The file.
        task: Reads the example of a line.

    Raises:
        InputError: if something is missing; the message names file and line.
    """
    models: dict[str, dict[tuple[int, int], tuple[Item, Completion]]] = {}
    for number, (where, line) in enumerate(_read_lines(path)):
        texts = _texts(line, where)
        if not isinstance(line.get("example", {}), dict):
            given = json.dumps(line["example"])[:80]
            raise InputError(f"{where}: `example` is {given}; expected an object, as our own lines have it")
        try:
            example = task.example_of(line)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        index, first, model = number, 0, path.name
        if "sample" in line:  # one of our own
            try:
                index, first, model = int(line["index"]), int(line["sample"]), str(line["model"])
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{where}: the line has sample; then it needs index and model as well"
                ) from error
        found = models.setdefault(model, {})
        prompt = line.get("prompt", line.get("question"))
        for sample, text in enumerate(texts, start=first):
            if (index, sample) in found:
                raise InputError(f"{where}: sample {sample} of example {index} of {model} is there already")
            completion = Completion(prompt, text, *(line.get(key) for key in DECODING_KEYS))
            found[index, sample] = Item(index, sample, example), completion
    if not models:
        raise InputError(f"generations={path} has no lines")
    return {model: [found[key] for key in sorted(found)] for model, found in models.items()}


def _texts(line: Line, where: str) -> list[str]:
    key = next((key for key in TEXT_KEYS if key in line), "")
    texts: list[Any] = line[key] if isinstance(line.get(key), list) else [line.get(key)]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{where}: no completion's text; expected it under one of {', '.join(TEXT_KEYS)}, the line has "
            f"{', '.join(line)}"
        )
    return texts


def _read_lines(path: Path) -> Iterator[tuple[str, Line]]:
    """Yield the place and the content of each line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"generations={path} can't be read ({error}); give a jsonl file of generations"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parse(line, where)


def _parse(text: str, where: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); expected one object a line") from error
    if not isinstance(line, dict):
        raise InputError(f"{where} is not an object; expected one object a line")
    return line
