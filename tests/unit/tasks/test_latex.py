"""LaTeX answers: boxes, and the MATH data set's equality, edge cases included."""

from __future__ import annotations

import pytest

from spg.tasks.parsing.latex import SLIP, box_content, boxed_in_answer, is_equiv, last_boxed, normalize


@pytest.mark.parametrize(
    ("text", "published", "mended"),
    [
        (r"so \boxed{5}", "5", "5"),
        (r"\boxed{4} then \boxed{ \frac{1}{2} }", r" \frac{1}{2} ", r"\frac{1}{2}"),
        (r"\boxed{1 \boxed{2}}", "2", "2"),
        (r"\boxed{3} and \boxed{4", None, "3"),
        (r"\boxed{", None, None),
        (r"\boxed{}", "", ""),
        (r"\boxed 4$ and \boxed{5}", "4", "5"),
        (r"\boxed 4", "4", None),
        (r"\boxed5 {6}", r"\boxed5 {6}", None),
        (r"\fbox{7}", r"\fbox{7}", None),
        (r"\boxed}{{}x", r"\boxed}{{}", None),
        ("no box", "no box", None),
        ("", "", None),
    ],
)
def test_boxes(text: str, published: str | None, mended: str | None) -> None:
    assert last_boxed(text) == published
    assert box_content(text) == mended


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (r"\frac12", r"\dfrac{1}{2}", True),
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac12", True),
        (".5", "0.5", True),
        (r"\frac{72}1", r"\frac{72}{1}", False),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"5\text{ cm}", "5", True),
        (r"5\text{cm}", "5", False),
        (r"\left(1, 2\right)", "(1,2)", True),
        ("x=5", "5", True),
        ("x+1=5", "5", False),
        (r"90^\circ", "90", True),
        (r"\$5\%", "5", True),
        (r"1,\!000", "1,000", True),
        # what the rule fails on is compared as it stands
        ("a/b", "a/b", True),
        ("a/b", "a /b", False),
        (r"2\sqrt", r"2\sqrt", True),
        (r"5\text{ cm}\text{ x}", "5", False),
        ("1" * 5000 + "/2", "1" * 5000 + "/2", True),
    ],
)
def test_equality(first: str, second: str, same: bool) -> None:
    assert is_equiv(first, second) is same
    assert is_equiv(second, first) is same


def test_no_answer_equals_no_answer_alone() -> None:
    assert is_equiv(None, None)
    assert not is_equiv(None, "")
    assert not is_equiv("", None)


@pytest.mark.parametrize("text", [r"\sqrt", r"\frac", "a/b", r"1\text{ a}\text{ b}"])
def test_what_the_rule_fails_on(text: str) -> None:
    with pytest.raises(ValueError, match=r"two units|of nothing|invalid literal"):
        normalize(text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"<answer>\boxed{5}</answer>", 1.0),
        (r"<answer>\boxed{5}", 1.0),
        (r"\boxed{5}<answer>5</answer>", 0.75),
        (r"<answer>4</answer><answer>\boxed{5}</answer>", 0.75),
        (r"\boxed{5}</answer>", 0.5),
        ("5", 0.25),
    ],
)
def test_format_score(text: str, score: float) -> None:
    """A box is worth 0.25, in the first answer alone; the released pattern can't see one."""
    assert boxed_in_answer(text) == score
    assert boxed_in_answer(text, SLIP) == (0.75 if "<answer>" in text else 0.25)
