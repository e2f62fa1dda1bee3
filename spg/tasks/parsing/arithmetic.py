"""Arithmetic in texts of a model: parsed into a tree and computed there, never run as a program."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

# longest expression that is read; it also limits the size of every number
MAX_CHARACTERS = 2000
# largest whole number that a power may have as its value, in bits
MAX_BITS = 20_000

_EXACT: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        bits = max(base.bit_length() - 1, 0) * exponent
        if abs(base) > 1 and bits > MAX_BITS:
            raise OverflowError("too large a power")
    return base**exponent


_PYTHON = {**_EXACT, ast.FloorDiv: operator.floordiv, ast.Pow: _power}


def exact_value(text: str) -> Fraction | None:
    """Return the value of whole numbers, + - * / and parentheses, or None if the text has anything else."""
    tree = _parse(text)
    if tree is None or any(isinstance(n, ast.Constant) and type(n.value) is not int for n in ast.walk(tree)):
        return None
    value = _value(tree, _EXACT, Fraction)
    return value if isinstance(value, Fraction) else None


def python_value(text: str) -> int | float | complex | None:
    """Return the value in Python of numbers, + - * / // ** and parentheses, or None if it is not a number.

    Powers beyond 20,000 bits have no value here. The authors' scorers evaluate any text of these characters.
    """
    tree = _parse(text)
    return None if tree is None else _value(tree, _PYTHON, lambda constant: constant)


def _parse(text: str) -> ast.expr | None:
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "'int' object is not callable"
            return ast.parse(text, mode="eval").body
    # the last two if the text is nested too deeply for the parser
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(tree: ast.expr, operators: Mapping[type, Any], number: Callable[[Any], Any]) -> Any:
    def of(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return number(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            return operators[type(node.op)](of(node.operand))
        raise ValueError("no arithmetic")

    try:
        return of(tree)
    # TypeError: the root of a negative number is complex, and Python has no floor of it
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return None
