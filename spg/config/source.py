"""Reading Python modules as text: where a dotted name is defined, without running any of its code.

Importing a part of the program would import torch, which takes seconds. The configuration check only needs
annotations and literal values, and these stand in the source.
"""

from __future__ import annotations

import ast
import importlib.machinery
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.expr | ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Module:
    """The text of a module, parsed; `tree` is None for a module without Python source."""

    name: str
    tree: ast.Module | None
    package: bool

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        """What the names at the module's top level are bound to; assignments by their right-hand side."""
        found: dict[str, Definition] = {}
        for statement in _statements(self.tree.body if self.tree is not None else []):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[statement.name] = statement
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    found[alias.asname or alias.name.partition(".")[0]] = statement
            elif isinstance(statement, ast.ImportFrom):
                found |= {alias.asname or alias.name: statement for alias in statement.names}
            elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                found |= {target.id: statement.value for target in targets if isinstance(target, ast.Name)}
        return found

    @cached_property
    def stars(self) -> list[str]:
        """The modules of which everything is imported."""
        return [
            self.absolute(statement)
            for statement in _statements(self.tree.body if self.tree is not None else [])
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*"
        ]

    @cached_property
    def dynamic(self) -> bool:
        """Whether the module may hold names that its text does not show."""
        if self.tree is None or "__getattr__" in self.definitions:
            return True
        calls = ("globals", "exec", "setattr", "vars")
        return any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls
            for node in ast.walk(self.tree)
        )

    def absolute(self, statement: ast.ImportFrom) -> str:
        """Return the full name of the module that a `from ... import` names."""
        if statement.level == 0:
            return statement.module or ""
        parents = self.name.split(".")
        kept = parents[: len(parents) - statement.level + self.package]
        return ".".join([*kept, *([statement.module] if statement.module else [])])


@dataclass(frozen=True)
class Found:
    """A definition and the module in which it stands."""

    module: Module
    node: Definition


class UnknownError(LookupError):
    """A name that can't be found in source text, although it may exist when the program runs."""


class AbsentError(LookupError):
    """A name that does not exist; `parent` is the module or class without it and `names` what that has."""

    def __init__(self, parent: str, name: str, names: list[str]) -> None:
        super().__init__(f"{parent} has no {name}")
        self.parent = parent
        self.name = name
        self.names = names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements in order, with those inside `if`, `try` and `with`."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


@cache
def module(name: str) -> Module | None:
    """Return a module by its full name, or None if there is no such module. Nothing is imported."""
    found = spec(name)
    if found is None:
        return None
    source = None
    if found.loader is not None and hasattr(found.loader, "get_source"):
        try:
            source = found.loader.get_source(name)
        except (ImportError, OSError):
            source = None
    try:
        tree = None if source is None else ast.parse(source)
    except SyntaxError:
        tree = None
    return Module(name, tree, found.submodule_search_locations is not None)


@cache
def spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return where a module lies, or None if there is no such module.

    `importlib.util.find_spec` would import the parent packages.
    """
    parent = name.rpartition(".")[0]
    path = None
    if parent:
        above = spec(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        path = list(above.submodule_search_locations)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        found = None if find is None else find(name, path)
        if found is not None:
            return found
    return None


def find(dotted: str) -> Found:
    """Return what a dotted path such as `spg.algorithms.estimators.ELBO` names.

    Raises:
        AbsentError: if a module or a class on the way does not have the next name.
        UnknownError: if source text does not tell.
    """
    names = dotted.split(".")
    for number in range(len(names) - 1, 0, -1):
        start = module(".".join(names[:number]))
        if start is not None:
            return _member(start, names[number:])
    raise AbsentError("", names[0], [])


def resolve(where: Module, expression: ast.expr) -> Found:
    """Return what a name or an attribute, as written in the module `where`, refers to; raises as `find`."""
    return _member(where, _dotted(expression))


def dotted_name(where: Module, expression: ast.expr) -> str:
    """Return the full dotted name that a name or an attribute in the module `where` refers to.

    Raises UnknownError if the expression is not a name, or its first part is not imported.
    """
    first, *rest = _dotted(expression)
    definition = where.definitions.get(first)
    if isinstance(definition, ast.Import):
        return ".".join([_imported(definition, first), *rest])
    if isinstance(definition, ast.ImportFrom):
        return ".".join([where.absolute(definition), _original(definition, first), *rest])
    if definition is None:
        return ".".join(["builtins", first, *rest])
    return ".".join([where.name, first, *rest])


def _dotted(expression: ast.expr) -> list[str]:
    if isinstance(expression, ast.Name):
        return [expression.id]
    if isinstance(expression, ast.Attribute):
        return [*_dotted(expression.value), expression.attr]
    raise UnknownError(ast.unparse(expression))


def _imported(statement: ast.Import, name: str) -> str:
    return next(
        (alias.name if alias.asname else name)
        for alias in statement.names
        if (alias.asname or alias.name.partition(".")[0]) == name
    )


def _original(statement: ast.ImportFrom, name: str) -> str:
    return next((alias.name for alias in statement.names if (alias.asname or alias.name) == name), name)


def _member(where: Module, names: list[str]) -> Found:
    first, *rest = names
    definition = where.definitions.get(first)
    if isinstance(definition, ast.Import | ast.ImportFrom):
        if isinstance(definition, ast.Import):
            path = [_imported(definition, first)]
        else:
            path = [where.absolute(definition), _original(definition, first)]
        return _follow(".".join(path), rest)
    if isinstance(definition, ast.Name | ast.Attribute):
        return _member(where, [*_dotted(definition), *rest])
    if definition is None:
        return _find_elsewhere(where, first, rest)
    if isinstance(definition, ast.ClassDef) and rest:
        for statement in _statements(definition.body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == rest[0]:
                return Found(where, statement)
        raise UnknownError(".".join(names))
    if rest:
        raise UnknownError(".".join(names))
    return Found(where, definition)


def _follow(path: str, rest: list[str]) -> Found:
    inside = module(path)
    if inside is not None and rest:
        return _member(inside, rest)
    if inside is not None:
        raise UnknownError(path)
    return find(".".join([path, *rest]))


def _find_elsewhere(where: Module, first: str, rest: list[str]) -> Found:
    """Look for a name that the module does not define: a submodule, or one of its `import *`."""
    if where.package and module(f"{where.name}.{first}") is not None:
        return _follow(f"{where.name}.{first}", rest)
    for star in where.stars:
        inside = module(star)
        if inside is None:
            raise UnknownError(star)
        try:
            return _member(inside, [first, *rest])
        except AbsentError:
            continue
    if where.dynamic:
        raise UnknownError(f"{where.name}.{first}")
    raise AbsentError(where.name, first, sorted(where.definitions))


def literal(node: ast.expr) -> Any:
    """Return the value of a literal expression, with numbers computed from numbers such as `2**31 - 1`.

    Raises:
        ValueError: if the expression is not a literal.
    """
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](literal(node.left), literal(node.right))
    if isinstance(node, ast.Tuple):
        return tuple(literal(item) for item in node.elts)
    if isinstance(node, ast.List):
        return [literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {literal(key): literal(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)
