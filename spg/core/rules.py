"""What a parameter may be, said once in its annotation: `beta: Positive`, `region: Literal["to_eos", "all"]`.

`checked` lets a constructor refuse other values. `spg.config.parts` reads the same annotations from the
source text, so that the command line is checked before torch is imported. This module therefore knows only
numbers and words.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt, Predicate

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Words:
    """Says in words what a value may be, for rules that the bounds alone do not describe."""

    text: str


@dataclass(frozen=True)
class Matches:
    """Restricts a text to those that a regular expression matches as a whole."""

    pattern: str


Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
# 0 to below 1
Share = Annotated[float, Interval(ge=0, lt=1)]
Seed = Annotated[int, Interval(ge=0, le=2**31 - 1)]


def bounds(annotation: Any) -> tuple[Any, list[Any]]:
    """Return the plain type of an annotation and its constraints, in order."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    base, *extra = get_args(annotation)
    inner, before = bounds(base)
    return inner, before + extra


def is_rule(annotation: Any) -> bool:
    """Return whether an annotation restricts values: a number, a choice, true or false, or `... | None`."""
    base, constraints = bounds(annotation)
    if constraints or get_origin(base) is Literal or base in (bool, int, float):
        return True
    return get_origin(base) in (Union, types.UnionType) and all(
        option is type(None) or is_rule(option) for option in get_args(base)
    )


def allows(annotation: Any, value: Any) -> bool:
    """Return whether an annotation that `is_rule` allows a value; true and false are not numbers."""
    base, constraints = bounds(annotation)
    return _is_of(base, value) and all(_meets(constraint, value) for constraint in constraints)


def words(annotation: Any) -> str:
    """Return in words what an annotation allows, as `a whole number, 1 or more`."""
    base, constraints = bounds(annotation)
    said = [constraint.text for constraint in constraints if isinstance(constraint, Words)]
    if said:
        return said[-1]
    origin = get_origin(base)
    if origin is Literal:
        return f"one of: {', '.join(map(str, get_args(base)))}"
    if origin in (Union, types.UnionType):
        options = get_args(base)
        parts = [
            words(option)
            for option in options
            if get_origin(option) is not Literal and option is not type(None)
        ]
        literals = [
            str(name) for option in options if get_origin(option) is Literal for name in get_args(option)
        ]
        if literals and not parts:
            parts = [f"one of: {', '.join(literals)}"]
        elif literals:
            parts.append(" or ".join(literals))
        return ", or ".join([*parts, *(["null"] if type(None) in options else [])])
    if base is bool:
        return "true or false"
    return _range(base, constraints)


def check(name: str, annotation: Any, value: Any) -> None:
    """Raise ValueError, naming value and rule, if the rule does not allow the value."""
    if not allows(annotation, value):
        raise ValueError(f"{name}={value!r} is out of range; allowed: {words(annotation)}")


def checked(target: T) -> T:
    """Make a constructor, a function or a dataclass refuse arguments that its annotations do not allow.

    Annotations that are no rule (tensors, other parts) are left to the function itself.

    Raises:
        ValueError: when called, for the first argument that its rule does not allow.
    """
    if is_dataclass(target):
        setattr(target, "__init__", _checking(target.__init__, target))  # noqa: B010
        return target
    return typing.cast(T, _checking(target, target))


def _checking(function: Callable[..., Any], annotated: Any) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.cache
    def rules() -> dict[str, Any]:
        hints = typing.get_type_hints(annotated, include_extras=True)
        return {name: hint for name, hint in hints.items() if name != "return" and is_rule(hint)}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, rule in rules().items():
            if name in given:
                check(name, rule, given[name])
        return function(*args, **kwargs)

    return wrapper


def _is_of(base: Any, value: Any) -> bool:
    origin = get_origin(base)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(base))
    if origin in (Union, types.UnionType):
        return any(allows(option, value) for option in get_args(base))
    if base is bool:
        return isinstance(value, bool)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if base is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if base is type(None) or base is None:
        return value is None
    return isinstance(value, origin or base)


def _meets(constraint: Any, value: Any) -> bool:
    if isinstance(constraint, Interval):
        return all(_meets(part, value) for part in constraint)
    if isinstance(constraint, Matches):
        return re.fullmatch(constraint.pattern, value) is not None
    if isinstance(constraint, Predicate):
        return bool(constraint.func(value))
    if isinstance(constraint, Gt):
        return bool(value > constraint.gt)
    if isinstance(constraint, Ge):
        return bool(value >= constraint.ge)
    if isinstance(constraint, Lt):
        return bool(value < constraint.lt)
    return not isinstance(constraint, Le) or bool(value <= constraint.le)


def _range(base: Any, constraints: Sequence[Any]) -> str:
    limits = [part for c in constraints for part in (c if isinstance(c, Interval) else [c])]
    low = next((part for part in limits if isinstance(part, Gt | Ge)), None)
    high = next((part for part in limits if isinstance(part, Lt | Le)), None)
    kinds = {int: "a whole number", float: "a number", str: "a text"}
    kind = kinds.get(base, "a value")

    def shown(number: Any) -> str:
        return str(number) if isinstance(number, int) else f"{number:g}"

    if low is None and high is None:
        return kind
    if high is None:
        assert low is not None
        return f"{kind} above {shown(low.gt)}" if isinstance(low, Gt) else f"{kind}, {shown(low.ge)} or more"
    top = f"below {shown(high.lt)}" if isinstance(high, Lt) else shown(high.le)
    if low is None:
        return f"{kind}, {top}" if isinstance(high, Lt) else f"{kind}, {top} or less"
    start = f"above {shown(low.gt)}" if isinstance(low, Gt) else f"from {shown(low.ge)}"
    return f"{kind} {start} to {top}"
