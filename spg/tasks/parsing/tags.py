"""The answer tags of a completion; reading them takes time linear in its length."""

from __future__ import annotations

OPEN, CLOSE = "<answer>", "</answer>"


def first_answer(text: str) -> str | None:
    """Return the stripped text between the first closed <answer> and its </answer>, or None."""
    start = text.find(OPEN)
    end = text.find(CLOSE, start)
    return None if start == -1 or end == -1 else text[start + len(OPEN) : end].strip()


def last_answer(text: str) -> str | None:
    """Return the stripped content of the last <answer> ... </answer>, or None."""
    found, at = None, 0
    while (start := text.find(OPEN, at)) != -1 and (end := text.find(CLOSE, start)) != -1:
        found = text[start + len(OPEN) : end].strip()
        at = end + len(CLOSE)
    return found
