r"""Answers in LaTeX: \boxed{...}, and the rule by which the MATH data set compares answers.

The rules are those of the released code, mistakes included. The time of each is linear in the length of the
text.
"""

from __future__ import annotations

from spg.tasks.parsing.tags import CLOSE, OPEN

# the released format score looks for this: in "\boxed" of a plain Python string the \b is a backspace
SLIP = "\boxed"
BOX = r"\boxed"

# what the rule of the MATH data set replaces first, in this order
REPLACED = (
    ("\n", ""),
    (r"\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
)


def last_boxed(text: str) -> str | None:
    r"""Return what the released code takes for the content of the last box, or None if it never closes.

    "\boxed 4$" comes before any \boxed{...}; a text without a box is its own content, and \fbox{5} stays so.
    """
    if rf"{BOX} " in text:
        return text.rpartition(rf"{BOX} ")[2].partition("$")[0]
    start = text.rfind(BOX)
    if start == -1:
        start = text.rfind(r"\fbox")
    if start == -1:
        return text
    box = _through_closing_brace(text[start:])
    if box is not None and box.startswith(BOX + "{"):
        return box[len(BOX) + 1 : -1]
    return box


def box_content(text: str) -> str | None:
    r"""Return the stripped content of the last closed \boxed{...}, or None if there is none."""
    pieces = text.split(BOX + "{")
    for piece in reversed(pieces[1:]):
        box = _through_closing_brace("{" + piece)
        if box is not None:
            return box[1:-1].strip()
    return None


def _through_closing_brace(text: str) -> str | None:
    """Return the text up to the brace that closes the first one, or None if none does."""
    depth = 0
    for place, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[: place + 1]
    return None


def boxed_in_answer(text: str, box: str = BOX) -> float:
    r"""Return the format score: 1 for tags with a box, 0.75 tags only, 0.5 box only, 0.25 neither.

    Only the text after the first opening tag counts as inside.

    Args:
        text: The completion.
        box: The beginning of a box; `SLIP` gives the released score.
    """
    _, opened, rest = text.partition(OPEN)
    inside = rest.partition(OPEN)[0].partition(CLOSE)[0] if opened else text
    return (0.5 if opened else 0.0) + (0.5 if box in inside else 0.25)


def is_equiv(first: str | None, second: str | None) -> bool:
    """Return whether two LaTeX answers are equal by the rule of the MATH data set; None equals only None."""
    if first is None or second is None:
        return first is second
    try:
        return normalize(first) == normalize(second)
    except ValueError:
        return first == second


def normalize(text: str) -> str:
    r"""Return a LaTeX answer in the form that the MATH data set compares (Hendrycks et al., 2021).

    Raises:
        ValueError: for texts on which that rule fails, such as two units, \sqrt or \frac at the end, or
            "a/b".
    """
    for old, new in REPLACED:
        text = text.replace(old, new)
    text, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    # removing "\%" can leave another one; the rule removes that too, but not a third
    text = text.replace(r"\%", "").replace(r"\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = f"0{text}"
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    if text == "0.5":
        text = r"\frac{1}{2}"
    return _slash_as_fraction(text)


def _braced_roots(text: str) -> str:
    head, *tails = text.split(r"\sqrt")
    if "" in tails:
        raise ValueError("a root of nothing")
    return head + "".join(
        rf"\sqrt{tail}" if tail[0] == "{" else rf"\sqrt{{{tail[0]}}}{tail[1:]}" for tail in tails
    )


def _braced_fractions(text: str) -> str:
    head, *tails = text.split(r"\frac")
    pieces = [head]
    for tail in tails:
        if not tail:
            raise ValueError("a fraction of nothing")
        if tail[0] != "{":
            if len(tail) == 1:
                return text
            below = tail[1:] if tail[1] == "{" else f"{{{tail[1]}}}{tail[2:]}"
            tail = f"{{{tail[0]}}}{below}"
        pieces.append(tail)
    return r"\frac".join(pieces)


def _slash_as_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = map(int, parts)
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
