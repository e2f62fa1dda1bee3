"""Preference pairs in a file, as a task: two completions of a prompt, one chosen, one rejected.

The file has one JSON object a line: `prompt` (a text, or a chat as a list of messages), `chosen` and
`rejected` (texts without an end-of-text token), and `example` (of the task; needed if the task has a
template). `chosen_tokens` and `rejected_tokens` (token ids without an end-of-text token) are optional:
`spg.pairs` writes them if the tokenizer would read the text as other tokens than those that were decoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.files import parse_json
from spg.tasks.base import Task

# the sides of a pair; a sequence's side follows from its number in the group
SIDES = ("chosen", "rejected")


def tokens_key(side: str) -> str:
    """Return the key under which a line holds the token ids of one side."""
    return f"{side}_tokens"


class Preferences:
    """A task whose training examples are the pairs of a file. Everything else comes from another task.

    The reward of the chosen completion is 1 and that of the rejected one is 0, whatever the texts, so that
    the advantage over the group mean is +-0.5.

    Args:
        task: The task that the pairs belong to.
        path: A file of JSON lines.
    """

    # for the configuration check: see spg.config.parts
    completions_per_prompt = 2

    def __init__(self, task: Task, path: str) -> None:
        self.task = task
        self.path = Path(path)
        self.name = task.name
        self.parser = task.parser
        self.shots = task.shots
        self.workers = task.workers
        self._pairs: list[Example] = []

    def examples(self, split: str) -> Sequence[Example]:
        """Return the pairs for `train`, and the examples of the task for other splits.

        Raises:
            InputError: if the file or a line cannot be used; the message names both.
        """
        if split != "train":
            return self.task.examples(split)
        self._pairs = self._pairs or self._read()
        return self._pairs

    def prompt(self, example: Example) -> str | Chat:
        """Return the recorded prompt of a pair, and the prompt of the task for its own examples."""
        prompt: str | Chat = example["prompt"] if _is_pair(example) else self.task.prompt(example)
        return prompt

    def template(self, example: Example) -> Template | None:
        """Return the template of the task; for a pair that of its `example`, or None without one."""
        if not _is_pair(example):
            return self.task.template(example)
        return None if example["example"] is None else self.task.template(example["example"])

    def demonstrations(self) -> Sequence[Example]:
        """Return the demonstrations of the task."""
        return self.task.demonstrations()

    def target(self, example: Example) -> str:
        """Return the target of the task."""
        return self.task.target(example)

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return 1 for a chosen completion and 0 for a rejected one, by the `side` that `Recorded` adds."""
        if not _is_pair(example):
            return self.task.reward(example, completion)
        return {"preferred": float(example["side"] == SIDES[0])}

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the answer that the task finds."""
        return self.task.answer(example, completion)

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return the measures of the task."""
        return self.task.measure(example, completion)

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example of the task."""
        return self.task.example_of(record)

    def _read(self) -> list[Example]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"preferences.path={self.path} can't be read ({error}); give a jsonl file of pairs"
            ) from error
        pairs: list[Example] = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    pairs.append({"line": number, **self._pair(line)})
                except InputError as error:
                    raise InputError(f"{self.path}, line {number}: {error}") from error
        if not pairs:
            raise InputError(f"preferences.path={self.path} has no lines; give a file with one pair per line")
        return pairs

    def _pair(self, text: str) -> dict[str, Any]:
        """Return the pair of a line; raise InputError if something is missing."""
        try:
            line = parse_json(text)
        except ValueError as error:
            raise InputError(f"can't be read as JSON ({error}); expected one object per line") from error
        if not isinstance(line, dict):
            raise InputError("not an object; expected one object per line")
        missing = [key for key in ("prompt", *SIDES) if key not in line]
        if missing:
            raise InputError(
                f"no {', no '.join(missing)}; a pair has prompt, chosen and rejected; the line has "
                f"{', '.join(line) or 'nothing'}"
            )
        prompt = line["prompt"]
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise InputError(
                "`prompt` is neither a text nor a chat, which is a list of objects with the texts `role` and "
                "`content`; give one of the two"
            )
        for side in SIDES:
            if not isinstance(line[side], str):
                raise InputError(f"`{side}` is {json.dumps(line[side])[:80]}; expected the completion's text")
        if line["chosen"] == line["rejected"]:
            raise InputError(
                "`chosen` and `rejected` are the same text, so neither is preferred; leave it out"
            )
        example = None
        if line.get("example") is not None:
            example = dict(self.task.example_of(line))
        elif self.task.template(self.task.examples("validation")[0]) is not None:
            raise InputError(f"no example; {self.name} has a template, which follows from its `example`")
        ids = {key: line[key] for key in map(tokens_key, SIDES) if line.get(key) is not None}
        for key, value in ids.items():
            if not isinstance(value, list) or not all(type(token) is int for token in value):
                raise InputError(f"`{key}` is not a list of whole numbers; leave it out, or give token ids")
        return (
            {"prompt": prompt, "chosen": line["chosen"], "rejected": line["rejected"]}
            | ids
            | {"example": example}
        )


def _is_pair(example: Example) -> bool:
    return all(key in example for key in SIDES)


def _is_chat(prompt: Any) -> bool:
    if not isinstance(prompt, list) or not prompt:
        return False
    texts = [
        message.get(key) for message in prompt if isinstance(message, dict) for key in ("role", "content")
    ]
    return len(texts) == 2 * len(prompt) and all(isinstance(text, str) for text in texts)
