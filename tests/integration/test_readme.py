"""The README is short, its links lead somewhere, and what people ask first is one click away."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from spg import __version__
from tests import documents
from tests.helpers import ROOT

TEXT = documents.README.read_text()
LINKS = re.findall(r"\[([^\]]*)\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
MAKES = documents.lines(documents.README, "make ")


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150


@pytest.mark.parametrize(
    ("question", "answer", "pages"),
    [
        ("run", "trainer", ["docs/guide/train.md"]),
        ("resume", "resume=<run dir>", ["docs/guide/resume.md"]),
        ("sweep", "--multirun", ["docs/guide/sweeps.md"]),
        ("add a mask", "class Suffix", ["docs/extending/masking.md"]),
        ("evaluate", "spg.evaluate run=<run dir>", ["docs/guide/evaluation.md"]),
        ("eight GPUs", "trainer.devices=8", ["docs/guide/several-gpus.md"]),
    ],
)
def test_what_people_ask_first_is_one_click_away(question: str, answer: str, pages: list[str]) -> None:
    linked = [target for _, target in LINKS]
    assert any(page in linked for page in pages), question
    assert any(answer in (ROOT / page).read_text() for page in pages), question


def test_links_lead_to_files() -> None:
    for _, target in LINKS:
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_method_and_model_is_in_its_table() -> None:
    for group in ("algorithm", "model"):
        rows = [row for row in TEXT.splitlines() if row.startswith("| `")]
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert any(f"`{path.stem}`" in row for row in rows), path.stem


@pytest.mark.parametrize(
    "line",
    [
        *MAKES,
        "make help",
        "make lint",
        "make docs",
        "make format",
        "make fake",
        "make test-all",
        "make clean",
    ],
)
def test_make_targets_exist(line: str) -> None:
    done = subprocess.run([*line.split(), "-n"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_demo_is_the_command_of_the_readme() -> None:
    assert MAKES == ["make demo", "make test"]
    demo = subprocess.run(["make", "demo", "-n"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "-m spg.train task=sudoku estimator=mixture beta=1.5" in demo


def test_the_citation_is_of_this_version_and_names_the_authors_of_the_readme() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    for author in citation["preferred-citation"]["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in TEXT


def test_the_workflow_does_what_the_script_does() -> None:
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    assert any(".ci/run" in step.get("run", "") for step in steps)
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()
