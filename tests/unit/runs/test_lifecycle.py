"""Starting a run and going on with it, with a stand-in for training."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.config import ConfigError
from spg.core.errors import Interrupted, RunError
from spg.runs import lifecycle
from spg.runs.directory import copy_config, read_config
from spg.runs.jobs import train_job
from spg.runs.lifecycle import Run
from spg.runs.status import read_status, write_status
from tests.helpers import QUICK

# what a crash or an accident makes of a file
BROKEN = {
    "empty": b"",
    "zeros": bytes(300),
    "list": b"[1, 2]",
    "half": b'{"state": "run',
    "bytes": b"\xff\xfe{",
}


class Trainer:
    """Stands for training: writes what a run leaves, and notes how often it was called."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def __call__(self, run: Run) -> bool:
        self.runs.append(run)
        saved = run.folder / "checkpoints"
        saved.mkdir(exist_ok=True)
        lifecycle.write_config(run.cfg, run.folder)
        rows = "".join(f"{update}\n" for update in range(run.cfg.trainer.max_updates + 1))
        (run.folder / "metrics.csv").write_text(f"update\n{rows}")
        (saved / "last.ckpt").write_text("weights")
        copy_config(run.folder)
        write_status(run.folder, saved=True)
        summary = {"updates": run.cfg.trainer.max_updates, "unused_knobs": []}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        return False


@cache
def composed() -> DictConfig:
    return config.compose("config", QUICK)


def compose(*overrides: str) -> DictConfig:
    """Return a configuration with changed settings; composing each anew would take a quarter of a second."""
    cfg = composed().copy()
    for line in overrides:
        key, value = line.split("=")
        OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x)
    return cfg


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def auto(tmp_path: Path, trainer: Trainer) -> Callable[..., Path]:
    """Give the same command with `resume=auto`, and other settings."""

    def give(*overrides: str) -> Path:
        lifecycle.start_or_resume(compose(*overrides), tmp_path / "run", list(overrides), trainer)
        return tmp_path / "run"

    return give


def stop_by_signal(run: Run) -> bool:
    """Stand for a run that SLURM's signal reaches."""
    run.stop.training = True
    os.kill(os.getpid(), signal.SIGUSR1)
    raise Interrupted("stopped after update 4, which is saved")


def test_the_same_command_starts_goes_on_and_ends_well(
    auto: Callable[..., Path], trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = auto()
    assert read_status(folder)["state"] == "finished"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    caplog.clear()
    auto()
    auto("trainer.max_updates=4")
    assert [record.getMessage() for record in caplog.records] == [f"Finished already: {folder}"] * 2
    assert {path: path.read_bytes() for path in before} == before
    assert len(trainer.runs) == 1
    write_status(folder, state="running")  # as a kill leaves it
    auto()
    assert trainer.runs[1].changes == ()
    auto("trainer.max_updates=12", "trainer.checkpoint_every=6", "trainer.keep_every=4")
    assert trainer.runs[2].changes == (
        "trainer.max_updates=12",
        "trainer.checkpoint_every=6",
        "trainer.keep_every=4",
    )
    assert read_config(folder).trainer.keep_every == 4
    assert "resume: null" in (folder / "config.yaml").read_text()


def test_another_run_is_refused_with_the_key(auto: Callable[..., Path], trainer: Trainer) -> None:
    folder = auto()
    with pytest.raises(
        ConfigError, match=r"holds a run with beta=1\.5, not 2\.0; give another hydra\.run\.dir"
    ) as error:
        auto("beta=2.0")
    assert "\n" not in str(error.value)
    assert read_status(folder)["state"] == "finished"
    (folder / "generations.jsonl").touch()
    with pytest.raises(ConfigError, match="holds an evaluation"):
        auto()
    assert len(trainer.runs) == 1


def test_killed_before_its_first_checkpoint_it_begins_anew(
    auto: Callable[..., Path], trainer: Trainer
) -> None:
    folder = auto()
    for moment in ("no metrics", "metrics", "half a checkpoint"):
        (folder / "checkpoints" / "last.ckpt").unlink()
        write_status(folder, state="running", saved=False)
        if moment == "no metrics":
            (folder / "metrics.csv").unlink()
        if moment == "half a checkpoint":
            (folder / "checkpoints" / "last.ckpt.tmp").write_text("wei")
        auto()
    assert len(trainer.runs) == 4


@pytest.mark.parametrize("case", ["finished", "saved", "of 0.5", "of a multirun"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    auto: Callable[..., Path], trainer: Trainer, case: str
) -> None:
    """It would write over the metrics and weights that are there."""
    folder = auto()
    (folder / "checkpoints" / "last.ckpt").unlink()
    if case == "saved":
        write_status(folder, state="interrupted")
    if case == "of 0.5":  # which did not note the first checkpoint
        (folder / "status.json").write_text('{"state": "running"}')
        (folder / "summary.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = "has done 8 updates, but its checkpoints are gone"
    if case == "of a multirun":
        cfg = compose("trainer.max_updates=12")
        train_job(cfg, folder, [], {"seed": 0}, trainer)
        assert read_status(folder)["state"] == "finished"
        (folder / "error.txt").unlink(missing_ok=True)
        write_status(folder, **json.loads(before[folder / "status.json"]))
        del before[folder / "status.json"]
    else:
        with pytest.raises(ConfigError, match=words):
            lifecycle.resume(str(folder), ["trainer.max_updates=12"], trainer)
        with pytest.raises(ConfigError, match=words):
            auto("trainer.max_updates=12")
    assert {path: path.read_bytes() for path in before} == before
    assert len(trainer.runs) == 1


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_status_is_mended(
    auto: Callable[..., Path], trainer: Trainer, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = auto()
    (folder / "status.json").write_bytes(content)
    with pytest.raises(ConfigError, match="this run is finished"):
        lifecycle.resume(str(folder), [], trainer)
    assert "status.json can't be read as JSON; by the other files the run's state is: finished" in caplog.text
    (folder / "summary.json").unlink()
    lifecycle.resume(str(folder), [], trainer)
    assert "the run's state is: unknown" in caplog.text
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("content", [*BROKEN.values(), None], ids=[*BROKEN, "cut"])
def test_a_broken_configuration_is_mended(
    auto: Callable[..., Path], trainer: Trainer, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = auto()
    path = folder / "config.yaml"
    whole = path.read_bytes()
    write_status(folder, state="running")
    if content is None:
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    lifecycle.resume(str(folder), [], trainer)
    assert (
        f"{path} is broken; its copy {folder / 'checkpoints' / 'config.yaml'} takes its place" in caplog.text
    )
    assert path.read_bytes() == whole
    assert trainer.runs[-1].cfg.mu == composed().mu


def test_without_a_copy_the_command_itself_mends_the_configuration(
    auto: Callable[..., Path], trainer: Trainer
) -> None:
    folder = auto()
    whole = (folder / "config.yaml").read_bytes()
    for path in (folder / "config.yaml", folder / "checkpoints" / "config.yaml"):
        path.write_bytes(bytes(100))
    with pytest.raises(ConfigError, match=r"can't be read .* with resume=auto hydra\.run\.dir="):
        lifecycle.resume(str(folder), [], trainer)
    write_status(folder, state="running")
    auto()
    assert (folder / "config.yaml").read_bytes() == whole


def test_requeueing_needs_a_command_that_goes_on(tmp_path: Path, trainer: Trainer) -> None:
    cfg = compose("trainer.requeue=true")
    with pytest.raises(ConfigError, match=r"add resume=auto hydra\.run\.dir="):
        lifecycle.start(cfg, tmp_path / "run", [], trainer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_that_a_signal_stops_is_requeued(
    tmp_path: Path, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def note(by: signal.Signals | None) -> None:
        assert read_status(tmp_path / "run")["state"] == "interrupted", "all is written before SLURM ends it"
        os.kill(os.getpid(), signal.SIGTERM)  # as SLURM does when it requeues the job
        calls.append(by)

    monkeypatch.setattr(lifecycle, "requeue", note)
    cfg = compose(f"trainer.requeue={asked}")
    with pytest.raises(Interrupted):
        lifecycle.start_or_resume(cfg, tmp_path / "run", [], stop_by_signal)
    assert calls == ([signal.SIGUSR1] if asked else [])
    assert read_status(tmp_path / "run")["state"] == "interrupted"


@pytest.mark.parametrize("training", [False, True])
def test_a_run_that_another_process_s_death_stopped_at_its_start_has_failed(
    training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers end the other processes by SIGTERM; put into the queue again, it would never get further."""
    asked = []
    monkeypatch.setattr(lifecycle, "requeue", asked.append)
    monkeypatch.setattr(lifecycle.link, "current", lambda: MagicMock(dead="the process of rank 1 failed"))
    cfg = config.compose("config", [*QUICK, "trainer.requeue=true"])

    def train(run: Run) -> bool:
        run.stop.training = training
        raise Interrupted("stopped")

    with pytest.raises(Interrupted if training else RunError):
        lifecycle.start_or_resume(cfg, tmp_path / "run", [], train)
    assert len(asked) == training
    assert read_status(tmp_path / "run")["state"] == ("interrupted" if training else "failed")
