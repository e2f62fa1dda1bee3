"""Errors that end a command with a message for the user and without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Input of the user that can't be used, or is missing; the text says what is wrong and what to do."""


class RunError(Exception):
    """A failure that ends a run; the text says what happened and what to do."""


class Interrupted(BaseException):
    """A run that the user stopped; its state is saved, and the text says how to continue."""


def exit_code(error: BaseException) -> int:
    """Return the code with which a command ends after an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, InputError):
        return 2
    return 130 if isinstance(error, Interrupted | KeyboardInterrupt) else 1
