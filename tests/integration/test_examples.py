"""The scripts in `examples/` run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"


def _run(name: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SPG_CACHE": str(folder / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"one_update.py", "own_reward.py"}


def test_one_update(tmp_path: Path) -> None:
    text = _run("one_update.py", folder=tmp_path)
    figures = {
        name: float(value) for name, value in re.findall(r"^(\S.*?) +(-?\d+\.\d+)$", text, re.MULTILINE)
    }
    assert 0.2 < figures["reward"] < 0.5
    assert figures["gradient norm"] > 0
    assert figures["bound/gap"] == round(figures["bound/upper"] - figures["bound/lower"], 4)
    assert len((EXAMPLES / "one_update.py").read_text().splitlines()) <= 80


def test_own_reward(tmp_path: Path) -> None:
    _run("own_reward.py", "trainer.threads=1", "hydra.run.dir=run", folder=tmp_path)
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "rewards/rows/mean" in header
    assert (tmp_path / "run" / "weights.safetensors").is_file()
