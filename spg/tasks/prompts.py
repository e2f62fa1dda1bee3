"""Prompts in words: the answer's published form, and prompts that a user gives in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spg.core.errors import InputError
from spg.core.examples import Chat, Example

ROLES = ("system", "user", "assistant")
TAGS = (
    "Think step by step between <reasoning> and </reasoning>. "
    "Then give {what} between <answer> and </answer>."
)


def instruct(task: str, what: str, question: str, shots: Sequence[tuple[str, str]] = ()) -> Chat:
    """Return a one-message chat: the task, the answer's form, worked (question, completion)s, the question.

    what: names in words what belongs between the answer tags.
    """
    parts = [f"{task}\n{TAGS.format(what=what)}"]
    parts += [f"Example {n}\n{asked}\n{told}" for n, (asked, told) in enumerate(shots, start=1)]
    return [{"role": "user", "content": "\n\n".join([*parts, question])}]


class PromptFile:
    """Prompts of another code base: a text, or a chat in JSON, with an example's columns in braces.

    A .json file holds a list of {"role", "content"}; an assistant's message at the end opens the completion.
    Any other file is the text of one user message. `{question}` stands for the example's column of that
    name; braces around anything else stay. Raises InputError where the file can't be used.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"task.prompt_file={path} can't be read: {error}") from error
        messages = [{"role": "user", "content": text}]
        if file.suffix == ".json":
            try:
                messages = json.loads(text)
            except ValueError as error:
                raise InputError(f"task.prompt_file={path} is no JSON: {error}") from error
        if not _is_chat(messages):
            raise InputError(
                f"task.prompt_file={path}: expected a list of objects with role "
                f"({', '.join(ROLES)}) and content"
            )
        if not any(f"{{{column}}}" in message["content"] for message in messages for column in columns):
            raise InputError(
                f"task.prompt_file={path} names no column, so that all prompts would be equal; this task has "
                + ", ".join(f"{{{column}}}" for column in columns)
            )
        self.messages: Chat = messages
        self.columns = tuple(columns)

    def __call__(self, example: Example) -> Chat:
        """Return the chat with the example's values in place."""
        return [{**m, "content": self._filled(m["content"], example)} for m in self.messages]

    def _filled(self, text: str, example: Example) -> str:
        # piece by piece, so that a value with braces is not filled in again
        for column in self.columns:
            mark = f"{{{column}}}"
            if mark in text:
                return str(example[column]).join(self._filled(piece, example) for piece in text.split(mark))
        return text


def _is_chat(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
            for m in messages
        )
    )
