"""Calls between examiner and candidate: one connection, and objects that stand for those on the other side.

A message is one line of JSON. `["ask", what, values, named, objects]` asks the other side to apply the
function `what` of `operator`, `builtins` or `OWN`. The answer is `["value", value, changed]` or `["error",
..., changed]`; `changed` lists the containers that the call changed. Before it answers, the other side may
ask in turn.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from .values import (
    CONTAINERS,
    MUTABLE,
    OTHERS,
    OWN,
    VIEWS,
    contents,
    is_builtin_class,
    makes_values,
    plain_class,
    refill,
)


class TimeUp(BaseException):
    """The time of a test is up."""


class PeerGone(BaseException):
    """The process at the other end is gone."""


class Connection:
    """One end of the connection. Each request is answered before the next one, but may cause others in turn.

    Within a request and its answer every mutable container has a number. So it stays the same object on both
    sides, and a change is copied back to where it came from.

    Attributes:
        trusting: True in the candidate, which does all that it is asked. The examiner only calls what a test
            handed over.
        objects: Whether the tests work with objects of the program's own classes. Only the examiner decides.
        lent: What the other side may speak of, by its number.
        numbers: The number of each lent value, by its id.
        remotes: What the other side lent, by its number.
    """

    def __init__(self, connection: socket.socket, trusting: bool) -> None:
        self.file = connection.makefile("rwb")
        self.trusting = trusting
        self.objects = False
        self.lent: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.remotes: dict[int, Remote] = {}

    def ask(self, what: str, *values: Any, **named: Any) -> Any:
        """Let the other side apply a function of `operator`, `builtins` or `OWN`; raise what it raises."""
        seen: dict[int, tuple[int, Any]] = {}
        objects = self.objects and what != "plain"
        self.send(["ask", what, self.encode(values, seen), self.encode(named, seen), objects])
        while True:
            kind, *rest = self.receive()
            if kind == "ask":
                self.serve(*rest)
                continue
            *answer, changed = rest
            made = [container for _, container in seen.values()]
            for number, held in changed:
                refill(made[number], self.decode(held, made))
            if kind == "value":
                return self.decode(answer[0], made)
            raise self.error(made, *answer)

    def serve(self, what: str, values: Any, named: Any, objects: bool) -> None:
        """Answer one request."""
        made: list[Any] = []
        before: list[str] = []

        def answer(kind: str, *parts: Any) -> list[Any]:
            self.objects = objects if self.trusting else self.objects  # the call may have asked back
            seen = {id(container): (n, container) for n, container in enumerate(made)}
            after = [self.encode(contents(container), seen) for container in made[: len(before)]]
            changed = [[n, held] for n, held in enumerate(after) if json.dumps(held) != before[n]]
            return [kind, *(self.encode(part, seen) for part in parts), changed]

        try:
            if not self.trusting and (what, values[0], values[1][0][0]) != ("call", "tuple", "there"):
                raise PermissionError("a program may only call what a test handed to it")
            function = OWN.get(what) or getattr(operator, what, None) or getattr(builtins, what)
            arguments, options = self.decode(values, made), self.decode(named, made)
            seen = {id(container): (n, container) for n, container in enumerate(made)}
            before = [json.dumps(self.encode(contents(container), seen)) for container in made]
            message = answer("value", function(*arguments, **options))
        except (TimeUp, PeerGone):
            raise
        except BaseException as error:  # noqa: BLE001  # the error is the answer
            names = tuple(cls.__name__ for cls in type(error).__mro__ if is_builtin_class(cls))
            message = answer("error", names, self.as_argument(error.args), error if self.trusting else None)
        self.send(message)

    def serve_all(self) -> None:
        """Answer requests until the other side hangs up."""
        with suppress(PeerGone):
            while True:
                _, *request = self.receive()
                self.serve(*request)

    def send(self, message: Any) -> None:
        """Write one message; raise PeerGone if nobody reads it."""
        try:
            self.file.write(json.dumps(message).encode() + b"\n")
            self.file.flush()
        except BrokenPipeError:
            raise PeerGone from None

    def receive(self) -> Any:
        """Return the next message; raise PeerGone if none will come."""
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise PeerGone
        return json.loads(line)

    def as_argument(self, value: Any) -> Any:
        """Return an argument of an exception: numbers and texts as they are, anything else as a text."""
        if type(value) is tuple:
            return tuple(map(self.as_argument, value))
        return value if value is None or isinstance(value, str | int | float) else str(value)

    def lend(self, value: Any) -> list[Any]:
        """Keep a value for the other side, and return the handle by which the other side speaks of it."""
        number = self.numbers.setdefault(id(value), len(self.lent))
        if number == len(self.lent):
            self.lent.append(value)
        return ["here", number]

    def encode(self, value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
        """Return a value as JSON: tagged lists, and handles for what cannot be written down.

        Args:
            value: What to write.
            seen: The mutable containers of this message so far, by id, each with its number.

        Raises:
            TypeError: in the examiner, for a value that cannot be handed to the program.
        """
        cls = plain_class(value)
        if self.trusting and self.objects and type(value).__module__ == "solution":
            return self.lend(value)
        if cls is str:
            return str.__str__(value)
        if value is None or cls in (bool, int, float):
            return value if value is None else cls(value)
        if cls in MUTABLE and id(value) in seen:
            return ["same", seen[id(value)][0]]
        if cls in MUTABLE:
            seen[id(value)] = len(seen), value
            return [cls.__name__, self.encode(contents(value), seen)]
        if cls in CONTAINERS.values():
            return [cls.__name__, [self.encode(v, seen) for v in value]]
        if cls is bytes:
            return ["bytes", value.hex()]
        if cls is complex:
            return ["complex", value.real, value.imag]
        if cls is range:
            return ["range", value.start, value.stop, value.step]
        if isinstance(value, VIEWS):
            view = next(v.__name__ for v in VIEWS if isinstance(value, v))
            return [view, self.encode(contents(dict(value.mapping)), seen)]
        if cls.__name__ in OTHERS and cls.__module__ == OTHERS[cls.__name__][0]:
            return [cls.__name__, *OTHERS[cls.__name__][1](value)]
        if is_builtin_class(value):
            return ["class", value.__name__]
        if isinstance(value, Remote):
            return ["there", value._spg_number]
        if not self.trusting and isinstance(value, Iterator):
            return ["iterator", self.lend(value.__next__)]
        if self.trusting or callable(value):
            return self.lend(value)
        raise TypeError(f"a {type(value).__name__} of the tests cannot be handed to the program")

    def decode(self, data: Any, made: list[Any]) -> Any:
        """Return the value that `encode` wrote; raise TypeError for anything else.

        made: The mutable containers of this message so far, in the order of their numbers.
        """
        if not isinstance(data, list):
            if isinstance(data, dict):
                raise TypeError("unreadable value")
            return data
        kind, *parts = data
        if kind == "same":
            return made[parts[0]]
        if kind in ("tuple", "frozenset"):
            return CONTAINERS[kind](self.decode(v, made) for v in parts[0])
        if kind in CONTAINERS or kind == "bytearray":
            container = CONTAINERS.get(kind, bytearray)()
            made.append(container)
            refill(container, self.decode(parts[0], made))
            return container
        if kind == "bytes":
            return bytes.fromhex(parts[0])
        if kind in ("complex", "range"):
            return getattr(builtins, kind)(*parts)
        if kind in ("dict_keys", "dict_values", "dict_items"):
            return getattr(dict(self.decode(parts[0], made)), kind[5:])()
        if kind in OTHERS:
            module, _, reader = OTHERS[kind]
            return getattr(getattr(importlib.import_module(module), kind), reader)(*parts)
        if kind == "class":
            value = getattr(builtins, parts[0], None)
            if self.trusting or makes_values(value):
                return value
        if kind == "there":
            return self.lent[parts[0]]
        if kind == "here":
            remote = self.remotes.get(parts[0])
            cls = RemoteObject if self.objects and not self.trusting else Remote
            if type(remote) is not cls:
                remote = self.remotes[parts[0]] = cls(self, parts[0])
            return remote
        if kind == "iterator" and self.trusting:
            return iter(self.decode(parts[0], made), object())  # which ends with StopIteration
        raise TypeError("unreadable value")

    def error(self, made: list[Any], names: Any, arguments: Any, handle: Any) -> BaseException:
        """Return the exception that the other side raised, as an object of the nearest builtin class."""
        for name in self.decode(names, made):
            cls = getattr(builtins, name, None)
            if isinstance(cls, type) and issubclass(cls, BaseException):
                with suppress(TypeError):  # some cannot be made from their arguments
                    error = cls(*self.decode(arguments, made))
                    if not self.trusting:
                        error.remote = RemoteObject(self, handle[1])  # type: ignore[attr-defined]
                    return error
        return RuntimeError("the program raised something unknown")


class Remote:
    """Something on the other side. It can be called and iterated over, and it is equal to itself only.

    The names of the two attributes are unlikely, since a test may ask for any attribute of the real object.
    """

    _spg_connection: Connection
    _spg_number: int

    def __init__(self, connection: Connection, number: int) -> None:
        self.__dict__.update(_spg_connection=connection, _spg_number=number)

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Call the object on the other side."""
        return self._spg_connection.ask("call", self, *values, **named)

    def __iter__(self) -> Iterator[Any]:
        iterator, taken = self._spg_connection.ask("iter", self), 0
        # fetch more at once, the more was taken already
        while block := self._spg_connection.ask("take", iterator, max(1, taken // 4)):
            taken += len(block)
            yield from block

    def __next__(self) -> Any:
        return self._spg_connection.ask("next", self)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and self._spg_connection.ask("isinstance", value, self) is True


class RemoteObject(Remote):
    """An object of a class that a test named: it answers for itself."""

    def __getattr__(self, name: str) -> Any:
        return self._spg_connection.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._spg_connection.ask("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            return bool(self._spg_connection.ask("eq", self, other))
        # the object's own `__eq__` has no say about a plain value: compare what it is as a tuple, dict, ...
        plain = self._spg_connection.ask("plain", self)
        return not isinstance(plain, Remote) and bool(plain == other)


def forward(function: str) -> Callable[..., Any]:
    """Return a method that lets the other side apply a function to the object."""

    def method(self: Remote, *values: Any) -> Any:
        return self._spg_connection.ask(function, self, *values)

    return method


def forward_reflected(function: str) -> Callable[..., Any]:
    """Return a method that does the same for the right operand of an operator."""

    def method(self: Remote, other: Any) -> Any:
        return self._spg_connection.ask(function, other, self)

    return method


for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "xor"):
    setattr(RemoteObject, f"__{name}__", forward(name))
    setattr(RemoteObject, f"__r{name}__", forward_reflected(name))
for name in ("and", "or"):
    setattr(RemoteObject, f"__{name}__", forward(f"{name}_"))
for name in ("lt", "le", "gt", "ge", "neg", "abs", "contains", "getitem", "setitem", "delitem", "pow"):
    setattr(RemoteObject, f"__{name}__", forward(name))
for name in ("len", "str", "repr", "bool", "int", "float", "reversed", "round", "format", "hash"):
    setattr(RemoteObject, f"__{name}__", forward(name))
