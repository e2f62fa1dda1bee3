"""The README's commands run as they are written, made short by overrides at their end."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spg import config
from spg.errors import Interrupted
from spg.status import write_status
from tests import faults
from tests.helpers import ROOT, run, train_here

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python -m spg.")]
MAKES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("make ")]
SHORT = {
    "train": "trainer.max_updates=4 trainer.prompts_per_rollout=2 task.eval_size=8 trainer.eval_batch_size=8",
    "pretrain": "pretrain.steps=2",
    "evaluate": "",
}
SAVED = '{"question": "1+1?", "ground_truth": "2", "generation": "<answer>\\\\boxed{2}</answer>"}\n'


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6
    assert MAKES == ["make demo", "make test"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that was interrupted in the middle."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        faults.interrupted("4", patch.setattr)
        with pytest.raises(Interrupted):
            train_here(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an evaluation that lacks its last lines."""
    folder = tmp_path_factory.mktemp("runs") / "evaluated"
    run("evaluate", "task.eval_size=8", "eval_batch_size=4", folder=folder)
    lines = (folder / "generations.jsonl").read_text().splitlines(keepends=True)
    (folder / "generations.jsonl").write_text("".join(lines[:5]))
    (folder / "results.json").unlink()
    write_status(folder, state="interrupted")
    return folder


def shortened(words: list[str], module: str, folder: Path) -> list[str]:
    """Return overrides that make a command short and keep what it writes in `folder`."""
    if "--help" in words or any(word.startswith("resume=") for word in words):
        return []
    if module == "figures":
        return [f"output={folder}"]
    where = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    if "-cn" in words:  # one job of each kind instead of the whole sweep
        where += ["beta=1", "seed=1"]
    if module == "evaluate" and not any(word.startswith("generations=") for word in words):
        where.append("task.eval_size=8")
    return [*SHORT[module].split(), *where]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Path, evaluated: Path
) -> None:
    monkeypatch.setenv("SPG_CACHE", str(tmp_path / "cache"))
    saved = tmp_path / "saved.jsonl"
    saved.write_text(SAVED)
    for mark, path in (
        ("<run dir>", stopped),
        ("<evaluation dir>", evaluated),
        ("<saved generations>", saved),
    ):
        line = line.replace(mark, str(path))
    _, _, module, *words = shlex.split(line)
    words += shortened(words, module.removeprefix("spg."), tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "line", [*MAKES, "make help", "make lint", "make format", "make test-all", "make clean"]
)
def test_make_targets_exist(line: str) -> None:
    done = subprocess.run([*line.split(), "-n"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_demo_is_the_command_of_the_readme() -> None:
    demo = subprocess.run(["make", "demo", "-n"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "-m spg.train task=sudoku estimator=mixture beta=1.5" in demo


def test_every_group_and_option_is_in_the_map() -> None:
    for group in config.groups():
        (row,) = re.findall(rf"^\| `{group}` \| (.*?) \|", README, flags=re.MULTILINE)
        for path in (config.CONF_DIR / group).glob("*.yaml"):
            assert path.stem in row, f"{group}={path.stem}"


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(
        r"`((?:spg|conf|tests|docs|sweeps|results|benchmarks)/[\w/.]+\.\w+)`", README
    ) + re.findall(r"\]\((docs/.*?)\)", README):
        assert (ROOT / name).is_file(), name
