"""A wheel, installed outside of the checkout, trains; a source distribution holds what a build needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT

BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"

# asks a coding task about a right and a wrong program, or says that the kernel grants no namespaces
SANDBOX = """
from spg.core.errors import InputError
from spg.tasks.mbpp import MBPP

task = MBPP()
right, wrong = "def double(x): return 2 * x", "def double(x): return x"
row = {"task_id": 1, "text": "Double a number.", "code": right, "test_list": ["assert double(2) == 4"]}
example = task.example(row)
try:
    print(task.fraction(example, right), task.fraction(example, wrong))
except InputError as error:
    print("no namespaces:", error)
"""


def _run(*line: str, cwd: Path) -> str:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of the checkout without what builds and runs leave, so that building leaves nothing here."""
    folder = tmp_path_factory.mktemp("source") / "spg"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "site", "*.egg-info")
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in ("spg", "conf", "tests", "results", "benchmarks", "docs", "sweeps"):
            ignored = left_out if path.name != "spg" else shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / path.name, ignore=ignored)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    return folder


@pytest.mark.long
def test_a_wheel_trains_outside_of_the_checkout(source: Path, tmp_path: Path) -> None:
    built = _run(sys.executable, "-c", BUILD, "wheel", str(tmp_path), cwd=source).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / built) as file:
        names = set(file.namelist())
    assert {str(p.relative_to(source)) for p in (source / "spg").rglob("*") if p.is_file()} <= names
    assert {f"spg/{p.relative_to(source)}" for p in (source / "conf").rglob("*.yaml")} <= names
    assert not any(name.startswith(("tests/", "results/", "benchmarks/")) for name in names)

    # the libraries are those of this environment, spg is the wheel's alone
    _run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    places = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", str(places / "python"))
    _run(*pip, "install", "--quiet", "--no-deps", "--no-index", str(tmp_path / built), cwd=tmp_path)
    (inside,) = (tmp_path / "venv").glob("lib/python3.*/site-packages")
    (inside / "libraries.pth").write_text(str(Path(pytest.__file__).parent.parent))
    outside = tmp_path / "outside"
    outside.mkdir()
    where = _run(str(places / "python"), "-c", "import spg; print(spg.__file__)", cwd=outside)
    assert Path(where.strip()).is_relative_to(tmp_path)
    line = ("experiment=quick", "trainer.threads=1", f"hydra.run.dir={tmp_path / 'run'}")
    _run(str(places / "python"), "-m", "spg.train", *line, cwd=outside)
    assert (tmp_path / "run" / "weights.safetensors").exists()
    assert "estimator=mixture" in _run(str(places / "spg"), "train", "--help", cwd=outside)
    # a program of the sandbox runs, with the guest's files that the wheel holds
    judged = _run(str(places / "python"), "-c", SANDBOX, cwd=outside)
    assert judged.split() == ["1.0", "0.0"] or "no namespaces" in judged


@pytest.mark.long
def test_a_source_distribution_holds_what_a_build_needs_and_no_more(source: Path, tmp_path: Path) -> None:
    built = _run(sys.executable, "-c", BUILD, "sdist", str(tmp_path), cwd=source).splitlines()[-1]
    with tarfile.open(tmp_path / built) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = [p for folder in ("spg", "conf") for p in (source / folder).rglob("*") if p.is_file()]
    assert {str(p.relative_to(source)) for p in wanted} <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    assert not any(name.startswith(("tests/", "results/", "benchmarks/", "docs/")) for name in names)
