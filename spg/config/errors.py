"""The error of a configuration that can't be used."""

from __future__ import annotations

from spg.core.errors import InputError


class ConfigError(InputError):
    """A mistake in what the user asked for; its text is all that the user needs to see."""
