"""Docstrings: every public function has one, and those that take or give tensors name shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from spg.tasks.base import Task
from tests.helpers import ROOT

FILES = sorted((ROOT / "spg").rglob("*.py"))


def public(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.ClassDef, ast.ClassDef | None]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node, None
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                    yield child, node


def inherited(owner: ast.ClassDef | None, name: str) -> bool:
    """Whether a method's contract stands in the class it comes from (a protocol, a base of ours)."""
    return owner is not None and (bool(owner.bases) or hasattr(Task, name))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_say_what_they_are(path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node, owner in public(tree):
        if ast.get_docstring(node) is None:
            assert inherited(owner, node.name), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tensors_come_with_shapes(path) -> None:
    for node, owner in public(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) or (
            ast.get_docstring(node) is None and inherited(owner, node.name)
        ):
            continue
        annotations = [a.annotation for a in node.args.args if a.annotation] + [node.returns]
        takes_tensor = any(a is not None and re.search(r"\bTensor\b", ast.unparse(a)) for a in annotations)
        if takes_tensor and owner is None:
            assert re.search(r"\[.*\]", ast.get_docstring(node) or ""), f"{path.name}: {node.name}"
