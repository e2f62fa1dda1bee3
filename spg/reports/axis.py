"""How the settings of a sweep are laid out in a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spg.reports.styles import KNOWN, Dash, style
from spg.reports.tables import value_text

# values of the keys beside the first, if there are several
DASHES: tuple[Dash, ...] = ("-", "--", ":", "-.")
# the smallest distance between two ticks whose labels do not overlap, as a share of the axis
TIGHT = 1 / 14
# the first of these keys names the method
METHOD_KEYS = ("algorithm", "estimator")


class Axis:
    """Says which of a sweep's keys lies along x and which ones tell the categories apart.

    The x axis is the key with the most values among those that hold numbers alone. All other keys together
    name the category, the method first.

    Attributes:
        numeric: The key along x; None if no key holds numbers alone.
        others: The other keys.
        ticks: The sorted values of the numeric key.
        categories: The values of the other keys as text, in the order of the settings.
        even: Whether ticks are evenly spaced because their labels would overlap otherwise.
    """

    def __init__(self, settings: Sequence[Mapping[str, Any]]) -> None:
        values = {key: list(dict.fromkeys(s[key] for s in settings)) for key in settings[0]}
        numbers = [k for k, v in values.items() if len(v) > 1 and all(isinstance(x, int | float) for x in v)]
        self.numeric = max(numbers, key=lambda key: len(values[key]), default=None)
        self.others = sorted((k for k in values if k != self.numeric), key=_rank)
        self.ticks = sorted(values[self.numeric]) if self.numeric else []
        self.categories = list(dict.fromkeys(self.category(setting) for setting in settings))
        spread = self.ticks[-1] - self.ticks[0] if self.ticks else 0
        self.even = any(b - a < TIGHT * spread for a, b in zip(self.ticks, self.ticks[1:], strict=False))

    def category(self, setting: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the values of all keys but the numeric one, as text."""
        return tuple(value_text(setting[key]) for key in self.others)

    def x(self, setting: Mapping[str, Any]) -> float:
        """Return the place of a setting on the x axis: its value, or its rank if ticks are even."""
        value = setting[self.numeric or ""]
        return self.ticks.index(value) if self.even else value

    def label(self, setting: Mapping[str, Any]) -> str:
        """Return the label of a setting's category."""
        return ", ".join(
            KNOWN[value].label if key in METHOD_KEYS and value in KNOWN else f"{key}={value}"
            for key, value in zip(self.others, self.category(setting), strict=True)
        )

    def line(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments with which matplotlib draws the line of a setting's category.

        The first name of the category gives colour and marker. The dashes are those of the first name, unless
        the categories differ in their other names: then those give the dashes.
        """
        category = self.category(setting)
        if not category:
            return {"color": "#444444", "marker": "o", "linestyle": "-"}
        drawn = style(category[0], {names[0] for names in self.categories}).line
        rests = list(dict.fromkeys(names[1:] for names in self.categories))
        if len(rests) > 1:
            drawn["linestyle"] = DASHES[rests.index(category[1:]) % len(DASHES)]
        return drawn


def _rank(key: str) -> int:
    return METHOD_KEYS.index(key) if key in METHOD_KEYS else len(METHOD_KEYS)
