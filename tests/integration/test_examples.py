"""The scripts in `examples/` run."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"
# what `python <script> <argument> ...` does, in a process that has imported torch already
START = """
import runpy, sys
from pathlib import Path

del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run(name: str, *arguments: str, folder: Path) -> str:
    line = [sys.executable, "-c", START, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPG_CACHE": str(folder / "cache")}
    done = warm.run(line, cwd=folder, env=environment)
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


@pytest.mark.long
def test_own_reward(tmp_path: Path) -> None:
    _run("own_reward.py", "trainer.threads=1", "hydra.run.dir=run", folder=tmp_path)
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "rewards/rows/mean" in header
    assert (tmp_path / "run" / "weights.safetensors").is_file()
