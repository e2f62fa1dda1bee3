"""Rules and facts are read from source text, through imports, aliases and bases, without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from spg.config import parts, source
from spg.core import rules

FILES = {
    "__init__": "raise AssertionError('imported')",
    "kinds": """
        from typing import Annotated, Literal

        from annotated_types import Ge, Interval, Predicate

        from spg.core import rules
        from spg.core.rules import Matches, Words

        LEAST = 2
        Pair = Annotated[int, Ge(2)]
        Size = Pair
        Scale = Literal["a", "b"]
        Signs = Annotated[str, Matches("[+-]+"), Words("some of + -")]
    """,
    "base": """
        import dataclasses
        from dataclasses import dataclass, field
        from typing import ClassVar

        from torch import nn

        from .kinds import Pair as Two, Scale


        class Base(nn.Module):
            color = "red"
            sizes: tuple[int, ...] = (1, 2**3 - 1)

            def __init__(self, two: Two, scale: Scale | None = None, *, other: "Scale" = "a") -> None:
                raise AssertionError


        @dataclass(frozen=True)
        class Numbers:
            count: Two
            kind: ClassVar[str] = "numbers"
            made: list[int] = field(init=False, default_factory=list)


        @dataclasses.dataclass
        class More(Numbers):
            scale: Scale = "a"
    """,
    "parts": """
        import typing as t
        from abc import ABC
        from collections.abc import Sequence

        from torch import Tensor

        import lab_parts.kinds
        from lab_parts import base
        from lab_parts.base import *
        from lab_parts.kinds import Signs, Size
        from spg.core import rules as r

        class Child(base.Base):
            color = "blue"

            @staticmethod
            def make(size: Size): ...


        class Own(Base, ABC):
            def __init__(
                self,
                share: r.Share,
                signs: Signs,
                size: t.Optional[lab_parts.kinds.Size],
                either: t.Annotated[float, r.Words("any")] | t.Literal["auto"],
                tensor: Tensor,
                names: Sequence[str],
                tensor_or_count: Tensor | r.Count,
                plain,
            ) -> None: ...


        class Bare(ABC):
            pass


        class Unknown(dict):
            pass


        class Open:
            def __init__(self, size: Size, **rest): ...


        def function(size: Size = 2): ...


        Renamed = Own
    """,
}


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that reads a part of the package above."""
    for name, text in FILES.items():
        path = tmp_path / "lab_parts" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (parts.read, source.module, source.spec):
        cached.cache_clear()
    return lambda name: parts.read(f"lab_parts.{name}")


def words(part: parts.Part) -> dict[str, str | None]:
    """Return what each parameter may be, in words."""
    return {
        name: None if rule is None else rules.words(rule) for name, rule in (part.parameters or {}).items()
    }


def test_a_constructor_s_rules_are_read_through_imports_and_aliases(read: Any) -> None:
    assert words(read("parts.Own")) == {
        "share": "a number from 0 to below 1",
        "signs": "some of + -",
        "size": "a whole number, 2 or more, or null",
        "either": "any, or auto",
        "tensor": None,
        "names": None,
        "tensor_or_count": None,
        "plain": None,
    }
    assert read("parts.Renamed").parameters == read("parts.Own").parameters
    assert not {"lab_parts", "lab_parts.parts"} & set(sys.modules)


def test_a_class_without_a_constructor_has_that_of_its_base(read: Any) -> None:
    two = "a whole number, 2 or more"
    expected = {"two": two, "scale": "one of: a, b, or null", "other": "one of: a, b"}
    assert words(read("parts.Child")) == words(read("base.Base")) == words(read("parts.Base")) == expected
    assert words(read("base.More")) == {"count": two, "scale": "one of: a, b"}
    assert read("parts.Bare").parameters == {}
    assert not read("parts.Bare").open


def test_functions_and_methods_are_parts_too(read: Any) -> None:
    for name in ("parts.function", "parts.Child.make"):
        assert words(read(name)) == {"size": "a whole number, 2 or more"}


def test_what_the_text_does_not_tell_is_left_open(read: Any) -> None:
    assert read("parts.Open").open
    assert read("parts.Unknown").open
    assert read("parts.Unknown").rule("anything") is None
    assert parts.read("math.floor") is None, "it has no source"
    with pytest.raises(source.AbsentError, match=r"lab_parts\.parts has no Chld") as caught:
        read("parts.Chld")
    assert "Child" in caught.value.names
    with pytest.raises(source.AbsentError, match="has no pats"):
        read("pats.Child")


def test_facts_are_literal_class_attributes_and_inherited(read: Any) -> None:
    assert read("base.Base").fact("color") == "red"
    assert read("parts.Child").fact("color") == "blue"
    assert read("parts.Child").fact("sizes") == (1, 7)
    assert read("parts.Own").fact("color") == "red"
    assert read("parts.Own").fact("taste", "none") == "none"


def test_shipped_parts_declare_what_the_check_asks_for() -> None:
    fact = {
        name: parts.read(f"spg.algorithms.{name}")
        for name in ("masking.Trajectory", "masking.Complementary", "masking.Random", "objectives.dpo.DPO")
    }
    assert not fact["masking.Trajectory"].fact("fresh_each_update", True)
    assert fact["masking.Trajectory"].fact("needs_commit_steps")
    assert fact["masking.Complementary"].fact("draws_in_pairs") == "complementary"
    assert fact["masking.Random"].fact("draws_in_pairs") is None
    assert fact["objectives.dpo.DPO"].fact("needs_sums")
    assert fact["objectives.dpo.DPO"].fact("completions_per_prompt") == 2
