"""The README's commands run as they are written, made short by overrides at their end."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spg import config
from spg.core.errors import Interrupted
from spg.runs.status import write_status
from tests import faults
from tests.helpers import ROOT, run, train_here
from tests.unit.models.test_published import publish as publish_llada
from tests.unit.models.test_qwen3 import publish as publish_a2d

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python -m spg.")]
MAKES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("make ")]
# what makes a command for real models one for small ones that the tests write
SMALL = (
    "model.precision=32-true",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.devices=1",
    "trainer.strategy=auto",
    "gen_length=8",
    "block_size=4",
    "group_size=2",
)
SHORT = {
    "train": "trainer.max_updates=4 trainer.prompts_per_rollout=2 task.eval_size=8 trainer.eval_batch_size=8",
    "pretrain": "pretrain.steps=2",
    "evaluate": "",
    "export": "",
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


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small GSM8K."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "test"):
        rows = [{"question": f"{n}+{n}?", "answer": f"#### {2 * n}"} for n in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small LLaDA in the published layout."""
    return publish_llada(tmp_path_factory.mktemp("published") / "llada")


@pytest.fixture(scope="module")
def a2d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small Tiny-A2D in the published layout."""
    return publish_a2d(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def adapted(llada: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that trained an adapter on the small LLaDA."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    lines = ["model=llada_8b", "task=gsm8k", f"model.path={llada}", f"task.path={questions}"]
    return train_here(folder, *lines, *SMALL, "trainer.max_updates=4", "trainer.prompts_per_rollout=1")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of preference pairs that the embedded model made."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    run("pairs", f"output={path}", "prompts=8", "threads=1")
    return path


def shortened(words: list[str], module: str, folder: Path) -> list[str]:
    """Return overrides that make a command short and keep what it writes in `folder`."""
    if module == "export":
        return [f"output={folder}"]
    if "--help" in words or any(word.startswith("resume=") for word in words):
        return []
    if module == "figures":
        return [f"output={folder}"]
    if module == "pairs":
        return ["prompts=8", "threads=1"]
    where = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    if "-cn" in words:  # one job of each kind instead of the whole sweep
        where += ["beta=1", "seed=1"]
    if module == "evaluate" and not any(word.startswith("generations=") for word in words):
        where.append("task.eval_size=8")
    return [*SHORT[module].split(), *where]


def for_small_models(line: str, module: str, llada: Path, a2d: Path, questions: Path) -> list[str]:
    """Return overrides that put a small model, and a small GSM8K, in the place of a command's own."""
    large = any(name in line for name in ("model=llada_8b", "model=tiny_a2d", "experiment=spg_"))
    if not large:
        return []
    given = [f"model.path={a2d if 'tiny_a2d' in line else llada}"]
    given += [f"task.path={questions}"] if "gsm8k" in line else []
    if module == "evaluate":
        return [
            *given,
            "model.precision=32-true",
            "accelerator=cpu",
            "threads=1",
            "gen_length=8",
            "block_size=4",
        ]
    kept = [word for word in SMALL if "nf4" not in line or "accelerator" not in word]
    return [*given, *kept]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("SPG_CACHE", str(tmp_path / "cache"))
    saved = tmp_path / "saved.jsonl"
    saved.write_text(SAVED)
    run_of = "adapted" if "spg.export" in line or "adapter=" in line else "stopped"
    places = {
        "<run dir>": run_of,
        "<evaluation dir>": "evaluated",
        "<folder>": "llada",
        "<GSM8K>": "questions",
        "<pairs>": "recorded",
    }
    line = line.replace("output=<pairs>", f"output={tmp_path / 'pairs.jsonl'}")
    for mark, fixture in places.items():
        if mark in line:
            line = line.replace(mark, str(request.getfixturevalue(fixture)))
    _, _, module, *words = shlex.split(line.replace("<saved generations>", str(saved)))
    module = module.removeprefix("spg.")
    small = [request.getfixturevalue(name) for name in ("llada", "a2d", "questions")]
    words += shortened(words, module, tmp_path / "run")
    words += for_small_models(line, module, *small)
    done = subprocess.run(
        [sys.executable, "-m", f"spg.{module}", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if "nf4" in line and not torch.cuda.is_available():
        assert done.returncode == 2
        assert "CUDA" in done.stderr
        return
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
