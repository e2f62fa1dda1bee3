"""The benchmark's arithmetic, and one small run of it against the present version itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.laptop import PARTS, compared
from tests.helpers import ROOT


def test_medians_quartiles_and_their_ratio() -> None:
    row = compared([4.0, 2.0, 6.0], [1.0, 2.0, 3.0])
    assert row["other"] == {"median": 4.0, "low": 2.0, "high": 6.0, "n": 3}
    assert row["this"]["median"] == 2.0
    assert row["ratio"] == 2.0


@pytest.mark.long
def test_one_command_compares_two_versions(tmp_path: Path) -> None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout, so there is no other version to check out")
    output = tmp_path / "figures.json"
    line = ["--against", "HEAD", "--rounds", "1", "--rollouts", "2", "--output", str(output)]
    command = [sys.executable, "-m", "benchmarks.laptop", *line]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result = json.loads(output.read_text())
    for part in PARTS:
        assert part in text
        assert result["parts"][part]["this"]["n"] == {"time/rollout": 2, "time/update": 8}[part]
        assert 0.2 < result["parts"][part]["ratio"] < 5, "the same version twice"
