"""How each method looks: the same label, colour, marker and dashes in every figure.

The colours are from the palettes of Okabe and Ito and of Paul Tol. Any two of the eleven methods differ in
colour for readers with each kind of colour blindness; markers and dashes tell them apart in grey print.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

Marker = str | tuple[int, int, int]
Dash = str | tuple[int, tuple[float, ...]]

BLUE, ORANGE, GREY, GREEN, AMBER, BLACK = "#0072B2", "#D55E00", "#999999", "#009E73", "#E69F00", "#000000"


@dataclass(frozen=True)
class Style:
    """The look of one category.

    Attributes:
        label: The name that a figure shows.
        colour: A colour as `#RRGGBB`.
        marker: A marker of matplotlib.
        dash: A line style of matplotlib.
    """

    label: str
    colour: str
    marker: Marker
    dash: Dash

    @property
    def line(self) -> dict[str, Any]:
        """The arguments with which matplotlib draws a line in this style."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


# by the name of the option algorithm=...
METHODS = {
    "spg": Style("SPG", ORANGE, "D", "-"),
    "spg_eubo": Style("SPG, EUBO", BLUE, "o", "--"),
    "d1": Style("D1", "#56B4E9", "v", "-."),
    "wd1": Style("WD1", "#CC79A7", "^", ":"),
    "unigrpo": Style("UniGRPO", "#882255", "s", (0, (7, 1.5))),
    "coupled_grpo": Style("coupled-GRPO", GREEN, "P", (0, (3, 1, 1, 1))),
    "espo": Style("ESPO", BLACK, "X", (0, (3, 1, 1, 1, 1, 1))),
    "vrpo": Style("VRPO", "#332288", "<", (0, (1, 1))),
    "stepwise": Style("StepWise", AMBER, ">", (0, (8, 2, 2, 2))),
    "reward_shift": Style("reward shift", "#661100", "p", (0, (5, 4))),
    "reward_shift_grpo": Style("reward shift, GRPO", "#DDCC77", (4, 1, 0), (0, (8, 2, 1, 1, 1, 2))),
}
# by the name of the option estimator=...; the two that SPG uses look like SPG with them
ESTIMATORS = {
    "zero": Style("w/o neg", GREY, "X", "-."),
    "elbo": Style("ELBO", AMBER, "s", ":"),
    "eubo": Style("EUBO", BLUE, "o", "--"),
    "mixture": Style("Mixture", ORANGE, "D", "-"),
    "loose": Style("loose", GREEN, "^", (0, (5, 4))),
}
KNOWN = METHODS | ESTIMATORS
# for other names: the numbers of colours and of markers have no common factor, so that 30 pairs differ
OTHER_COLOURS = ("#44AA99", "#CC6677", "#117733", "#AA4499", "#999933")
OTHER_MARKERS: tuple[Marker, ...] = ("h", "d", "8", "|", "_", (3, 1, 0))
OTHER_DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":")
OTHERS = len(OTHER_COLOURS) * len(OTHER_MARKERS)


def style(name: str, among: Collection[str] = ()) -> Style:
    """Return the style of a category.

    The style of a name that is not known follows from the name alone, unless another unknown name in the same
    figure would look the same.

    Args:
        name: Name of a method, of an estimator, or of anything else.
        among: All names in the figure.
    """
    if name in KNOWN:
        return KNOWN[name]
    taken: dict[int, str] = {}
    for other in sorted({name, *among} - KNOWN.keys()):
        place = zlib.crc32(other.encode()) % OTHERS
        while place in taken and len(taken) < OTHERS:
            place = (place + 1) % OTHERS
        taken[place] = other
        if other == name:
            break
    return Style(
        name,
        OTHER_COLOURS[place % len(OTHER_COLOURS)],
        OTHER_MARKERS[place % len(OTHER_MARKERS)],
        OTHER_DASHES[place % len(OTHER_DASHES)],
    )
