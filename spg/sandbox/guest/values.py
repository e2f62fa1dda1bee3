"""Which values cross between examiner and candidate as themselves."""

from __future__ import annotations

import builtins
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any

CONTAINERS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}
MUTABLE = (list, set, deque, dict, OrderedDict, Counter, bytearray)
PLAIN = (bool, int, float, complex, str, bytes, bytearray, range, *CONTAINERS.values())
VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# other types: the module, how to write a value as plain arguments, and which method reads these
OTHERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "Decimal": ("decimal", lambda value: [str(value)], "__call__"),
    "Fraction": ("fractions", lambda value: [str(value)], "__call__"),
    "date": ("datetime", lambda value: [value.isoformat()], "fromisoformat"),
    "time": ("datetime", lambda value: [value.isoformat()], "fromisoformat"),
    "datetime": ("datetime", lambda value: [value.isoformat()], "fromisoformat"),
    "timedelta": ("datetime", lambda value: [value.days, value.seconds, value.microseconds], "__call__"),
    "array": ("array", lambda value: [value.typecode, value.tolist()], "__call__"),
    "slice": ("builtins", lambda value: [value.start, value.stop, value.step], "__call__"),
    "PosixPath": ("pathlib", lambda value: [str(value)], "__call__"),
}
# functions that can be asked for besides those of `operator` and `builtins`
OWN: dict[str, Callable[..., Any]] = {
    "take": lambda iterator, count: list(islice(iterator, count)),
    "plain": lambda value: value,
}


def is_builtin_class(value: Any) -> bool:
    """Return whether a value is a class that every interpreter has under its own name."""
    return isinstance(value, type) and getattr(builtins, value.__name__, None) is value


def makes_values(value: Any) -> bool:
    """Return whether a value is a class that makes nothing but plain values and exceptions.

    With any other class, above all `type`, the program could make objects of its own beside the tests.
    """
    return value in PLAIN or (is_builtin_class(value) and issubclass(value, BaseException))


def plain_class(value: Any) -> type:
    """Return the class as which a value crosses: an object of a subclass counts as one of the plain class."""
    return next((cls for cls in type(value).__mro__ if cls in PLAIN), type(value))


def contents(container: Any) -> Any:
    """Return the content of a mutable container as something immutable."""
    if isinstance(container, bytearray):
        return bytes(container)
    return tuple(container.items() if isinstance(container, dict) else container)


def refill(container: Any, held: Any) -> None:
    """Replace the content of a mutable container by what `contents` returned for another one."""
    container.clear()
    if isinstance(container, dict):
        container.update(dict(held))  # a Counter would add up pairs
    elif isinstance(container, set):
        container.update(held)
    else:
        container.extend(held)
