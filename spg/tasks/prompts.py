"""Prompts in words: the published form of an answer, and prompts from a file of the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spg.core.errors import InputError
from spg.core.examples import Chat, Example
from spg.core.files import parse_json

ROLES = ("system", "user", "assistant")
TAGS = (
    "Think step by step between <reasoning> and </reasoning>. "
    "Then give {what} between <answer> and </answer>."
)


def instruct(task: str, what: str, question: str, shots: Sequence[tuple[str, str]] = ()) -> Chat:
    """Return a chat with one message: the task, the form of the answer, worked examples, the question.

    Args:
        task: What to do, in words.
        what: What belongs between the answer tags, in words.
        question: The question.
        shots: Worked examples, as (question, completion).
    """
    parts = [f"{task}\n{TAGS.format(what=what)}"]
    parts += [f"Example {n}\n{asked}\n{answered}" for n, (asked, answered) in enumerate(shots, start=1)]
    return [{"role": "user", "content": "\n\n".join([*parts, question])}]


class PromptFile:
    """Prompts of another code base: a text, or a chat in JSON, with the columns of an example in braces.

    A .json file holds a list of {"role", "content"}; a last message of the assistant opens the completion.
    Any other file is the text of one user message. `{question}` stands for the column of that name; braces
    around anything else stay.

    Args:
        path: The file.
        columns: Columns of an example that may be named in braces.

    Raises:
        InputError: if the file cannot be used.
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
                messages = parse_json(text)
            except ValueError as error:
                raise InputError(f"task.prompt_file={path} can't be read as JSON: {error}") from error
        if not _is_chat(messages):
            raise InputError(
                f"task.prompt_file={path}: expected a list of objects with role "
                f"({', '.join(ROLES)}) and content"
            )
        if not any(f"{{{column}}}" in message["content"] for message in messages for column in columns):
            raise InputError(
                f"task.prompt_file={path} names no column, so all prompts would be equal; this task has "
                + ", ".join(f"{{{column}}}" for column in columns)
            )
        self.messages: Chat = messages
        self.columns = tuple(columns)

    def __call__(self, example: Example) -> Chat:
        """Return the chat with the values of the example in place."""
        return [{**m, "content": self._fill(m["content"], example)} for m in self.messages]

    def _fill(self, text: str, example: Example) -> str:
        # piece by piece, so that braces in a value are left alone
        for column in self.columns:
            mark = f"{{{column}}}"
            if mark in text:
                return str(example[column]).join(self._fill(piece, example) for piece in text.split(mark))
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
