"""What a part takes, read from the source of its class: the rule of each parameter, and facts about it.

A part is what a `_target_` names: an estimator, a mask, an objective, a task, a network, shipped or your own.
Its class says everything that the configuration check needs to know, and no list elsewhere does:

- A parameter's rule is its annotation in the constructor (or in the dataclass): `beta: Positive`. See
  `spg.core.rules`. The same annotation makes the constructor refuse other values, if it is `@checked`.
- A fact is a class attribute with a literal value, inherited as usual:

| class | fact | meaning |
| --- | --- | --- |
| objective | `needs_sums = True` | its estimator must have normalization=elbo_weight and a fixed omega |
| objective, preferences | `completions_per_prompt = 2` | group_size must be this number |
| objective | `couples = "sequence"` | the update takes one pass, see `spg.algorithms.objectives.coupling` |
| masking | `fresh_each_update = False` | all inner updates on a rollout get the same masks |
| masking | `needs_commit_steps = True` | follows the decoding steps, which recorded completions lack |
| masking | `draws_in_pairs = "..."` | num_mc must be even; the text names the kind of pair |
| masking | `draws_in_pairs = {"draws": ("antithetic",)}` | so only if a parameter has one of these values |
| any | `ordered = (("min_empty", "max_empty"),)` | the first parameter may not be above the second |
| any | `files = (("path", "hub"),)` | the parameter names what exists, or is one of the words after it |
| network | `published_sizes`, `_implied`, `_fixed` | how its config.json is read: see `spg.models.hub` |

Nothing is imported here: a class is found and read as text, in about a millisecond.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Optional, Union

from spg.config import source
from spg.core.rules import is_rule

# modules that hold nothing but rules, and may be imported to look a rule up
RULES = ("spg.core.rules", "typing", "typing_extensions", "annotated_types")
# base classes without a constructor of their own
PLAIN = ("builtins.object", "abc.ABC", "typing.Protocol", "typing.Generic")


class _Opaque:
    """Stands for an annotation that is not a rule, such as a tensor or another part."""


@dataclass(frozen=True)
class Part:
    """A class or function that a `_target_` names.

    Attributes:
        target: its dotted path.
        found: its definition in the source text.
    """

    target: str
    found: source.Found

    @property
    def name(self) -> str:
        """Its name, without its module."""
        return self.target.rpartition(".")[2]

    @cached_property
    def parameters(self) -> dict[str, Any] | None:
        """The annotation of each parameter, None for one that has no rule; None if the text does not tell."""
        try:
            return _parameters(self.found)
        except (source.UnknownError, source.AbsentError):
            return None

    @cached_property
    def open(self) -> bool:
        """Whether it takes parameters that it does not name."""
        return self.parameters is None or "**" in self.parameters

    def rule(self, parameter: str) -> Any:
        """Return the rule of a parameter as an annotation, or None if it has none."""
        return (self.parameters or {}).get(parameter)

    def fact(self, name: str, default: Any = None) -> Any:
        """Return the literal value of a class attribute, its own or an inherited one."""
        for cls in _lineage(self.found):
            for statement in cls.node.body if isinstance(cls.node, ast.ClassDef) else []:
                if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                    continue
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    try:
                        return source.literal(statement.value)
                    except (ValueError, TypeError):
                        return default
        return default


@cache
def read(target: str) -> Part | None:
    """Return the part that a dotted path names, or None if its source can't be read.

    Raises:
        source.AbsentError: if the path does not exist.
    """
    try:
        found = source.find(target)
    except source.UnknownError:
        return None
    if not isinstance(found.node, ast.ClassDef | ast.FunctionDef):
        return None
    return Part(target, found)


def _lineage(found: source.Found) -> Iterator[source.Found]:
    """Yield a class and its base classes, nearest first, as far as their source can be read."""
    if not isinstance(found.node, ast.ClassDef):
        return
    yield found
    for base in found.node.bases:
        named = base.value if isinstance(base, ast.Subscript) else base
        try:
            home, _, name = source.dotted_name(found.module, named).partition(".")
            if home in sys.stdlib_module_names and (home != "builtins" or hasattr(builtins, name)):
                continue
            yield from _lineage(source.resolve(found.module, named))
        except (source.UnknownError, source.AbsentError):
            continue


def _parameters(found: source.Found) -> dict[str, Any]:
    node = found.node
    if isinstance(node, ast.FunctionDef):
        return _arguments(found.module, node, method=False)
    assert isinstance(node, ast.ClassDef)
    functions = {s.name: s for s in node.body if isinstance(s, ast.FunctionDef)}
    if "__init__" in functions:
        return _arguments(found.module, functions["__init__"], method=True)
    own = _fields(found) if _is_dataclass(node) else {}
    inherited: dict[str, Any] = {}
    for base in node.bases:
        named = base.value if isinstance(base, ast.Subscript) else base
        if source.dotted_name(found.module, named) in PLAIN:
            continue
        above = source.resolve(found.module, named)
        if not isinstance(above.node, ast.ClassDef):
            raise source.UnknownError(node.name)
        inherited = _parameters(above)
        if inherited:
            break
    return inherited | own


def _is_dataclass(node: ast.ClassDef) -> bool:
    named = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(ast.unparse(name).rpartition(".")[2] == "dataclass" for name in named)


def _fields(found: source.Found) -> dict[str, Any]:
    assert isinstance(found.node, ast.ClassDef)
    fields: dict[str, Any] = {}
    for statement in found.node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        written = ast.unparse(statement.annotation)
        value = statement.value
        hidden = isinstance(value, ast.Call) and any(
            keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in value.keywords
        )
        if not hidden and "ClassVar" not in written and "KW_ONLY" not in written:
            fields[statement.target.id] = rule(found.module, statement.annotation)
    return fields


def _arguments(module: source.Module, function: ast.FunctionDef, method: bool) -> dict[str, Any]:
    given = function.args
    named = [*given.posonlyargs, *given.args][method:] + given.kwonlyargs
    found = {a.arg: None if a.annotation is None else rule(module, a.annotation) for a in named}
    return found | ({"**": None} if given.kwarg is not None else {})


def rule(module: source.Module, annotation: ast.expr) -> Any:
    """Return an annotation in the module's text as a rule of `spg.core.rules`, or None if it is not one."""
    try:
        value = _evaluate(module, annotation)
    except (source.UnknownError, source.AbsentError, ValueError, TypeError, AttributeError):
        return None
    return value if is_rule(value) else None


def _evaluate(module: source.Module, node: ast.expr) -> Any:
    """Return what an annotation means; what is not a rule becomes `_Opaque`."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):  # a quoted annotation
            return _evaluate(module, ast.parse(node.value, mode="eval").body)
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_evaluate(module, node.left), _evaluate(module, node.right)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        return _evaluate_subscript(module, node)
    if isinstance(node, ast.Name | ast.Attribute):
        return _evaluate_name(module, node)
    return _Opaque


def _evaluate_subscript(module: source.Module, node: ast.Subscript) -> Any:
    outer = _evaluate(module, node.value)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer is Literal:
        return Literal[tuple(source.literal(item) for item in inner)]
    if outer is Annotated:
        extra = [c for c in (_constraint(module, item) for item in inner[1:]) if c is not _Opaque]
        base = _evaluate(module, inner[0])
        return Annotated[(base, *extra)] if extra and base is not _Opaque else base
    if outer is Optional:
        return Optional[_evaluate(module, inner[0])]  # noqa: UP045
    if outer is Union:
        return Union[tuple(_evaluate(module, item) for item in inner)]  # noqa: UP007
    return _Opaque


def _evaluate_name(module: source.Module, node: ast.Name | ast.Attribute) -> Any:
    dotted = source.dotted_name(module, node)
    home, _, name = dotted.rpartition(".")
    if home == "builtins":
        value = getattr(builtins, name, _Opaque)
        return value if value in (bool, int, float, str) else _Opaque
    if home in RULES:
        return getattr(importlib.import_module(home), name)
    found = source.resolve(module, node)
    if isinstance(found.node, ast.expr):  # an alias, in this module or where it is imported from
        return _evaluate(found.module, found.node)
    return _Opaque


def _constraint(module: source.Module, node: ast.expr) -> Any:
    """Return a constraint inside `Annotated`, such as `Gt(0)`; `_Opaque` if the text does not tell."""
    if isinstance(node, ast.Name | ast.Attribute):
        found = source.resolve(module, node)
        return _constraint(found.module, found.node) if isinstance(found.node, ast.expr) else _Opaque
    if not isinstance(node, ast.Call):
        return _Opaque
    home, _, name = source.dotted_name(module, node.func).rpartition(".")
    if home not in RULES:
        return _Opaque
    try:
        positional = [source.literal(item) for item in node.args]
        named = {item.arg: source.literal(item.value) for item in node.keywords if item.arg is not None}
    except ValueError:
        return _Opaque
    return getattr(importlib.import_module(home), name)(*positional, **named)


def hints(schema: type) -> dict[str, Any]:
    """Return the rules of a class that may be imported: its annotated names."""
    found = typing.get_type_hints(schema, include_extras=True)
    return {name: hint for name, hint in found.items() if is_rule(hint)}
