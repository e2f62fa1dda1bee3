"""Imports point downwards: a module imports from floors below its own only."""

from __future__ import annotations

import ast
from itertools import combinations

import pytest

from tests.helpers import ROOT

PARTS = ("tags", "rows", "prompts", "arithmetic", "latex", "verify", "questions", "code")
TASK_PARTS = [f"tasks.{name}" for name in PARTS]
BENCHMARKS = [f"tasks.{name}" for name in ("sudoku", "countdown", "gsm8k", "math500", "humaneval", "mbpp")]
OBJECTIVES = [f"objectives.{name}" for name in ("spg", "grpo", "espo", "wd1", "dpo")]
FLOORS = [
    {"types", "limits", "seeding", "console", "memory", "errors", "files", "statistics"},
    {"masking", "estimators", "advantages", "objectives", *OBJECTIVES, "objectives.terms"},
    {
        "models",
        "models.head",
        "models.attention",
        "models.network",
        "models.tokenizer",
        "models.llada",
        "models.qwen3",
    }
    | {"tasks", "cage", "tasks.base", *TASK_PARTS, *BENCHMARKS}
    | {"status", "ranks", "published"},
    {"weights", "adapters", "quantization", "generations"},
    {"policy"},
    {"decoding", "sharding"},
    {"collect", "data", "loggers"},
    {"module", "preferences", "config", "sweeps"},
    {"callbacks", "pretraining", "usage", "plots", "runs", "launch", "sources", "results"},
    {"training", "completing", "exporting"},
    {"failure", "scoring"},
    {"train", "pretrain", "evaluate", "export", "figures", "reproduce", "pairs"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# a package and its own files share a floor; so may a file and the base it builds on
WITHIN = {
    ("objectives.terms", "estimators"),
    ("sources", "runs"),
    ("results", "sources"),
    ("models.network", "models.head"),
    ("models.llada", "models.network"),
    ("models.tokenizer", "published"),
    ("models.qwen3", "models.network"),
    ("models.qwen3", "models.attention"),
    ("models.llada", "models.attention"),
    ("models.attention", "models.network"),
    ("models.qwen3", "models.tokenizer"),
    ("sweeps", "config"),
}
# what tasks are made of, each after those it may use
WITHIN |= set(combinations(reversed(["cage", "tasks.base", *TASK_PARTS]), 2))
WITHIN |= {(task, part) for task in BENCHMARKS for part in ["cage", "tasks.base", *TASK_PARTS]}
WITHIN |= {(objective, part) for objective in OBJECTIVES for part in ("estimators", "objectives.terms")}
# help is shown, and torch imported, only when the command line has been checked
LATE = {("config", "usage"), ("runs", "training")}


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "spg":
            names = [f"spg.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.removeprefix("spg.") for name in names if name.startswith("spg.")}
    return found - {"__version__"}


FILES = sorted(
    p for p in (ROOT / "spg").rglob("*.py") if p.name != "__init__.py" or p.parent.name == "objectives"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path) -> None:
    name = ".".join(path.relative_to(ROOT / "spg").with_suffix("").parts).removesuffix(".__init__")
    for other in imports(path):
        if (name, other) in WITHIN | LATE:
            continue
        assert FLOOR[other] < FLOOR[name], f"{name} imports {other} from its own floor or above"


@pytest.mark.parametrize("floor", [0, 1])
def test_the_maths_knows_torch_and_its_own_floor_only(floor: int) -> None:
    allowed = {"__future__", "abc", "collections", "dataclasses", "hashlib", "math", "typing"}
    allowed |= {"numpy", "torch", "spg"}
    for name in FLOORS[floor] - {"console", "memory", "files"}:
        path = ROOT / "spg" / (name.replace(".", "/") + ("/__init__.py" if name == "objectives" else ".py"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed


def test_limits_and_configuration_import_no_torch() -> None:
    free = {"limits", "published", "config", "usage", "launch", "runs", "sweeps", "status", "ranks"}
    free |= {"statistics", "generations", "results", "scoring", *FLOORS[-1]}
    for name in free:
        tree = ast.parse((ROOT / "spg" / f"{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & {"torch", "lightning", "transformers"}
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in {"torch", "lightning", "transformers"}
