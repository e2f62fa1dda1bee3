"""What ends a run, in words that the user needs, without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Something that the user gave, or did not give, can't be used; the text says what and what to do."""


class RunError(Exception):
    """A run that can't go on; the text says what happened and what to do."""


class Interrupted(BaseException):
    """A run that was asked to stop; its state is saved, and the text says how to go on."""
