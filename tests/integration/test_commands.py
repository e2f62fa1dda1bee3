"""The commands of the README and the documentation are right, and run as they are written.

All of them are composed and checked in this process, in milliseconds each. Those in code blocks also run,
made short by overrides at their end: a few here, the others in the long tests.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

from spg import config
from spg.config import parts, source
from spg.core.errors import Interrupted
from spg.runs.status import write_status
from tests import documents, faults, slurm, warm
from tests.documents import Command
from tests.helpers import ROOT, run, train_here
from tests.unit.models.test_published import publish as publish_llada
from tests.unit.models.test_qwen3 import publish as publish_a2d

CHECKED = [
    command
    for command in documents.commands(inline=True)
    if "..." not in command.line and "spg.<command>" not in command.line
]
RUN = documents.commands(inline=False)
# what runs by default: each is a kind of its own, and no other test does the same
SHORT_ONES = ("python -m spg.evaluate run=<run dir>", "python -m spg.train algorithm=wd1")
# what makes a command for real models one for small ones that the tests write
SMALL = (
    "model.precision=32-true",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.devices=1",
    "trainer.strategy=auto",
    "trainer.checkpoint_format=whole",  # the other needs the strategy fsdp
    "gen_length=8",
    "block_size=4",
    "group_size=2",
)
SHORT = (
    "trainer.max_updates=4",
    "trainer.prompts_per_rollout=2",
    "task.eval_size=8",
    "trainer.eval_batch_size=8",
)
SAVED = '{"question": "1+1?", "ground_truth": "2", "generation": "<answer>\\\\boxed{2}</answer>"}\n'
LARGE = ("model=llada_8b", "model=tiny_a2d", "experiment=spg_")


def placeholders(line: str, **places: Path | str) -> str:
    """Return a command with paths in the place of `<run dir>` and the like."""
    for name, place in places.items():
        line = line.replace(f"<{name.replace('_', ' ')}>", str(place))
    assert "<" not in line, f"{line}: the tests know no such place"
    return line


def is_sweep(line: str) -> bool:
    """Return whether a command is a multirun, which is checked value by value."""
    return any(word in line.split()[3:] for word in ("-m", "--multirun", "-cn"))


def test_there_are_commands() -> None:
    assert len(documents.lines(documents.README, "python -m spg.")) == 6
    assert len(RUN) > 50
    modules = {command.line.split()[2] for command in RUN}
    names = {"train" if path.stem == "config" else path.stem for path in config.CONF_DIR.glob("*.yaml")}
    assert modules == {f"spg.{name}" for name in names}
    assert set(SHORT_ONES) <= {command.line for command in RUN}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=str(command), marks=[pytest.mark.long] if is_sweep(command.line) else [])
        for command in CHECKED
    ],
)
def test_commands_are_right(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents.lay_out(command.page, tmp_path)
    (tmp_path / "pairs").touch()
    (tmp_path / "gsm8k").mkdir(exist_ok=True)
    (tmp_path / "gsm8k" / "train.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # pages show parts of their own in modules of one name
    for cached in (source.module, source.spec, parts.read):
        cached.cache_clear()
    line = placeholders(
        command.line,
        run_dir="run",
        sweep_dir="sweep",
        evaluation_dir="evaluation",
        folder="folder",
        GSM8K="gsm8k",
        pairs="pairs",
        saved_generations="saved.jsonl",
        name="beta",
        task="gsm8k",
        method="d1",
    )
    _, _, module, *words = shlex.split(line)
    primary = {"spg.train": "config"}.get(module, module.removeprefix("spg."))
    words = config.group_choices(words)
    flags = [word for word in words if word in ("-m", "--multirun")]
    words = [word for word in words if word not in flags and not word.startswith("resume=")]
    if "submitit_slurm" in line:
        monkeypatch.setenv("PATH", slurm.install(tmp_path / "slurm")["PATH"])
    if "--help" not in words:
        assert config.preflight(primary, [*flags, *words]) is not None


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
    """Folder with a small GSM8K and a small MATH500."""
    folder = tmp_path_factory.mktemp("data")
    for task, question in (("gsm8k", "question"), ("math500", "problem")):
        for name in ("train", "test"):
            rows = [{question: f"{n}+{n}?", "answer": f"#### {2 * n}"} for n in range(16)]
            path = folder / task / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    lines = ["model=llada_8b", "task=gsm8k", f"model.path={llada}", f"task.path={questions / 'gsm8k'}"]
    return train_here(folder, *lines, *SMALL, "trainer.max_updates=4", "trainer.prompts_per_rollout=1")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of preference pairs that the embedded model made."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    run("pairs", f"output={path}", "prompts=8", "threads=1")
    return path


def shortened(words: list[str], module: str, folder: Path) -> list[str]:
    """Return overrides that make a command short and keep what it writes in `folder`."""
    if "--help" in words or any(word.startswith("resume=") and word != "resume=auto" for word in words):
        return []
    if module in ("export", "figures"):
        return [] if any(word.startswith("page=") for word in words) else [f"output={folder}"]
    if module == "pairs":
        return ["prompts=8", "threads=1"]
    where = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    if "-cn" in words:  # one job of each kind instead of the whole sweep
        where += ["seed=1", "beta=1"] if "beta" in words else ["seed=1"]
    if module == "evaluate" and not any(word.startswith("generations=") for word in words):
        where.append("task.eval_size=8")
    if module == "pretrain":
        where.append("pretrain.steps=2")
    return [*where, *(SHORT if module == "train" else [])]


def for_small_models(line: str, module: str, request: pytest.FixtureRequest) -> list[str]:
    """Return overrides that put a small model, and small data, in the place of a command's own."""
    if not any(name in line for name in LARGE):
        return []
    model = request.getfixturevalue("a2d" if "tiny_a2d" in line else "llada")
    given = [f"model.path={model}"]
    for task in ("gsm8k", "math500"):
        if task in line:
            given.append(f"task.path={request.getfixturevalue('questions') / task}")
    if module == "evaluate":
        cpu = ["model.precision=32-true", "accelerator=cpu", "threads=1"]
        return [*given, *cpu, "gen_length=8", "block_size=4"]
    return [*given, *(word for word in SMALL if "nf4" not in line or "accelerator" not in word)]


def page_of_results(line: str) -> bool:
    """Return whether a command is an hour's work on a page of results, or would fill such a page again."""
    return any(word in line for word in ("methods_", "page=", "reproduce", "output=results", "sweep=runs/"))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=str(command), marks=[] if command.line in SHORT_ONES else [pytest.mark.long])
        for command in RUN
        if not page_of_results(command.line)
    ],
)
def test_commands_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("SPG_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    documents.lay_out(command.page, work)
    (work / "saved.jsonl").write_text(SAVED)
    line = command.line.replace("output=<pairs>", f"output={tmp_path / 'pairs.jsonl'}")
    run_of = "adapted" if "spg.export" in line or "adapter=" in line else "stopped"
    fixtures = {
        "run_dir": run_of,
        "evaluation_dir": "evaluated",
        "folder": "llada",
        "GSM8K": "questions",
        "pairs": "recorded",
    }
    places: dict[str, Path | str] = {
        name: request.getfixturevalue(fixture)
        for name, fixture in fixtures.items()
        if f"<{name.replace('_', ' ')}>" in line
    }
    if "GSM8K" in places:
        places["GSM8K"] = Path(places["GSM8K"]) / "gsm8k"
    line = placeholders(line, **places, saved_generations="saved.jsonl", sweep_dir=ROOT / "results" / "omega")
    _, _, module, *words = shlex.split(line)
    module = module.removeprefix("spg.")
    words += shortened(words, module, tmp_path / "run")
    words += for_small_models(line, module, request)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if "submitit_slurm" in line:
        environment |= slurm.install(tmp_path / "slurm")
        words += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto"]
    done = warm.run([sys.executable, "-m", f"spg.{module}", *words], cwd=work, env=environment)
    if "nf4" in line and not torch.cuda.is_available():
        assert done.returncode == 2
        assert "CUDA" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
