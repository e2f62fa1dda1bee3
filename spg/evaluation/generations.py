"""generations.jsonl: completions, a line each, as an evaluation writes them and as others have saved them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spg.core.errors import InputError
from spg.core.examples import Example
from spg.tasks.base import Task

Line = dict[str, Any]
Key = tuple[str, int, int]

# under which of these a line has its completion: ours, then the authors' two
TEXTS = ("completion", "generation", "generations")
# what our lines tell of how a completion was made, None where it is not known
MADE = ("tokens", "decoded", "steps", "near_ties")


@dataclass(frozen=True)
class Item:
    """Sample number `sample` of example number `index`; `saved` is what a file of generations has of it."""

    index: int
    sample: int
    example: Example
    saved: Line = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is scored under one name: items, and what completes a batch of them.

    ready: called once before the first batch. complete: returns, for each item, its prompt, its completion
    and the entries MADE.
    """

    name: str
    items: Sequence[Item]
    complete: Callable[[Sequence[Item]], list[Line]]
    ready: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Source:
    """Where completions come from: subjects, what results.json says of them, what they are made with."""

    subjects: Sequence[Subject]
    settings: dict[str, Any]
    made_with: dict[str, Any]
    device: str | None = None
    precision: str | None = None
    split: str = "as in the file"
    shots: int | None = None


class Generations:
    """The file generations.jsonl of an evaluation: lines that are whole, by (model, index, sample).

    What an interruption left of a line at the end is cut off. Raises InputError where a line before the end
    can't be read.
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
            line = _parsed(text.decode("utf-8", errors="replace"), f"{path}, line {number}")
            self.lines[line["model"], line["index"], line["sample"]] = line

    def add(self, lines: Sequence[Line]) -> None:
        """Append lines, on disk when this returns."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        # half a surrogate pair has no UTF-8; written with a backslash it is JSON for the same text
        content = text.encode("utf-8", errors="backslashreplace")
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.lines |= {(line["model"], line["index"], line["sample"]): line for line in lines}

    def of(self, model: str) -> list[Line]:
        """Return a model's lines, ordered by example and sample, whatever their order in the file."""
        return [self.lines[key] for key in sorted(self.lines) if key[0] == model]


def line_of(model: str, item: Item, made: Line, answer: str | None, measures: Mapping[str, float]) -> Line:
    """Return the line of one scored completion; `made` has its prompt, its text and the entries MADE."""
    accuracy = measures["accuracy"]
    return {
        "model": model,
        "index": item.index,
        "sample": item.sample,
        "prompt": made["prompt"],
        "completion": made["completion"],
        "answer": answer,
        "correct": bool(accuracy) if accuracy in (0, 1) else accuracy,
        "measures": dict(measures),
        **{key: made[key] for key in MADE},
        "example": dict(item.example),
    }


def read_saved(path: Path, task: Task) -> dict[str, list[Item]]:
    """Return the saved completions of a jsonl file, {model: items}.

    Our own lines have completion, example, model, index and sample; the authors' have question, ground_truth
    and a text, or a list of samples, under generation or generations: an example each, one model, named as
    the file. Raises InputError, naming file and line, where something is missing.
    """
    models: dict[str, dict[tuple[int, int], Item]] = {}
    for number, (where, line) in enumerate(_lines(path)):
        key = next((key for key in TEXTS if key in line), None)
        texts = line[key] if key is not None and isinstance(line[key], list) else [line.get(key or "")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{where}: no completion's text; expected it under one of {', '.join(TEXTS)}, the line has "
                f"{', '.join(line)}"
            )
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
                raise InputError(f"{where}: beside sample, our own lines have index and model") from error
        items = models.setdefault(model, {})
        for sample, text in enumerate(texts, start=first):
            if (index, sample) in items:
                raise InputError(f"{where}: sample {sample} of example {index} of {model} is there already")
            made = {"prompt": line.get("prompt", line.get("question")), "completion": text}
            items[index, sample] = Item(
                index, sample, example, made | {name: line.get(name) for name in MADE}
            )
    if not models:
        raise InputError(f"generations={path} has no lines")
    return {model: [items[key] for key in sorted(items)] for model, items in models.items()}


def _lines(path: Path) -> Iterator[tuple[str, Line]]:
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
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error}); expected an object a line") from error
    if not isinstance(line, dict):
        raise InputError(f"{where} is no object; expected an object a line")
    return line
