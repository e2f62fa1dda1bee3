"""Modules and functions stay short enough to be read at once; the floors are checked by `lint-imports`."""

from __future__ import annotations

import ast

import pytest

from tests.helpers import ROOT

LONGEST_MODULE, LONGEST_FUNCTION = 400, 60
FILES = sorted((ROOT / "spg").rglob("*.py"))
COMMANDS = {"train", "pretrain", "evaluate", "pairs", "export", "figures", "reproduce", "plan"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE, f"split {path}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines; split it"


def test_only_packages_and_commands_stand_at_the_top() -> None:
    modules = {path.stem for path in (ROOT / "spg").glob("*.py")} - {"__init__"}
    assert modules == COMMANDS
    for name in modules:
        assert len((ROOT / "spg" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 10
