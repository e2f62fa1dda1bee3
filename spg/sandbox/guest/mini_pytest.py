"""The part of pytest that tests of single functions use, as a module made at run time."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from typing import Any

from .rpc import PeerGone, Remote, TimeUp


class Raises:
    """A block that must raise an exception, as `pytest.raises`."""

    def __init__(self, expected: Any, match: str | None = None) -> None:
        self.expected = expected if isinstance(expected, tuple) else (expected,)
        self.match = match
        self.value: BaseException | None = None

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        if error is None:
            raise AssertionError("nothing was raised")
        if isinstance(error, TimeUp | PeerGone):
            return False
        raised = getattr(error, "remote", error)
        if not any(isinstance(raised if isinstance(cls, Remote) else error, cls) for cls in self.expected):
            return False
        if self.match is not None and not re.search(self.match, str(error)):
            raise AssertionError(f"{str(error)!r} does not match {self.match!r}")
        self.value = error
        return True


class Approx:
    """A number, or a container of numbers, that is equal to anything near it, as `pytest.approx`."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self.expected = expected
        self.rel = (0.0 if abs is not None else 1e-6) if rel is None else rel
        self.abs = 1e-12 if abs is None else abs

    def near(self, expected: Any, actual: Any) -> bool:
        """Return whether two values, or all values in two containers, are near each other."""
        if isinstance(expected, dict) and isinstance(actual, dict):
            return expected.keys() == actual.keys() and all(self.near(expected[k], actual[k]) for k in actual)
        if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
            return len(expected) == len(actual) and all(map(self.near, expected, actual))
        try:
            within = max(self.rel * abs(expected), self.abs)
            return bool(expected == actual or (math.isfinite(expected) and abs(expected - actual) <= within))
        except TypeError:
            return bool(expected == actual)

    def __eq__(self, other: object) -> bool:
        return self.near(self.expected, other)

    __hash__ = None  # type: ignore[assignment]


class Marks:
    """Marks of tests: `parametrize` has its effect, all others have none."""

    def parametrize(self, names: Any, cases: Any, **_: Any) -> Callable[..., Any]:
        """Return a decorator that records the arguments of each call of a test."""
        listed = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)

        def mark(test: Any) -> Any:
            rows = [case if len(listed) > 1 else (case,) for case in cases]
            test.cases = [
                {**dict(zip(listed, row, strict=True)), **others}
                for row in rows
                for others in getattr(test, "cases", [{}])
            ]
            return test

        return mark

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def mark(*values: Any, **_: Any) -> Any:
            return values[0] if len(values) == 1 and callable(values[0]) else lambda test: test

        return mark


def make_pytest() -> types.ModuleType:
    """Return the module that tests import as `pytest`; its `run` calls a test with its fixtures and cases."""
    module = types.ModuleType("pytest")
    fixtures: dict[str, Any] = {}

    def fixture(*functions: Any, **_: Any) -> Any:
        if not functions:
            return fixture
        fixtures[functions[0].__name__] = functions[0]
        return functions[0]

    def supplied(function: Any, known: dict[str, Any]) -> Any:
        code = getattr(function, "__func__", function).__code__
        wanted = [n for n in code.co_varnames[: code.co_argcount] if n in known or n in fixtures]
        return function(**{n: known[n] if n in known else fixture_value(n, known) for n in wanted})

    def fixture_value(name: str, known: dict[str, Any]) -> Any:
        value = supplied(fixtures[name], known)
        return next(value) if isinstance(value, types.GeneratorType) else value

    def run(test: Any) -> None:
        set_up = getattr(getattr(test, "__self__", None), "setup_method", None)
        cases = getattr(test, "cases", [{}])
        if not cases:
            raise AssertionError("it is parametrized with nothing")
        for case in cases:
            if set_up is not None:
                supplied(set_up, {"method": test})
            supplied(test, case)

    def raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> Raises:
        block = Raises(expected, match)
        if call:
            with block:
                call[0](*call[1:], **named)
        return block

    def param(*values: Any, **_: Any) -> Any:
        return values if len(values) > 1 else values[0]

    def fail(reason: str = "") -> None:
        raise AssertionError(reason)

    module.__dict__.update(raises=raises, approx=Approx, mark=Marks(), fixture=fixture, run=run)
    module.__dict__.update(param=param, fail=fail)
    return module
