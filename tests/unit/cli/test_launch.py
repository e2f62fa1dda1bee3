"""How commands start: folders that cannot be written."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spg.cli import launch
from spg.cli.sweep import check_writable
from spg.core.errors import InputError
from spg.runs.status import lock


@pytest.mark.parametrize("module", ["evaluate", "config"])
def test_a_folder_that_can_t_be_written_is_one_line(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        monkeypatch.setattr(sys, "argv", [module, f"hydra.run.dir={folder}"])
        with pytest.raises(SystemExit) as ended:
            launch.run(module, print)
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("hydra.run.dir: nothing can be written there")
        assert told.count("\n") == 1
        with pytest.raises(InputError, match="can't be written to"), lock(folder):
            pass


def test_resume_auto_needs_a_directory_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "resume=auto", "seed=1"])
    with pytest.raises(SystemExit) as ended:
        launch.run("config", print, print)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("resume=auto needs a directory that the same command finds again")
    assert told.endswith("add hydra.run.dir=<run dir>\n")
    assert not list(tmp_path.iterdir())
    # with a directory it is a job with that word, which `spg.train` starts or goes on with
    seen: list[Any] = []
    for words in (["resume=auto"], ["resume=other", "resume=auto"]):
        argv = ["train", "-cd", str(tmp_path), *words, "seed=1", "hydra.run.dir=runs/mine"]
        monkeypatch.setattr(sys, "argv", argv)
        launch.run("config", lambda cfg: seen.append((cfg.resume, cfg.seed)), print)
    assert seen == [("auto", 1), ("auto", 1)]


def test_in_a_multirun_resume_auto_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs go on in any case, in the same directory."""
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(launch, "sweep", lambda primary, plan, argv, *rest: found.append((plan.name, argv)))
    for word in ([], ["resume=auto"]):
        monkeypatch.setattr(sys, "argv", ["train", "-m", *word, "seed=1,2"])
        launch.run("config", print, print)
    assert found[0] == found[1]


def test_a_job_s_own_error_is_not_taken_for_the_folder_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(cfg: Any) -> None:
        raise PermissionError("of the job")

    with pytest.raises(ValueError, match="a bug"), check_writable("x"):
        raise ValueError("a bug")
    monkeypatch.setattr(sys, "argv", ["evaluate", f"hydra.run.dir={tmp_path}"])
    ended = SimpleNamespace(return_value=None)
    monkeypatch.setattr(
        "hydra._internal.hydra.run_job", lambda task_function, **rest: task_function(None) or ended
    )
    with pytest.raises(PermissionError, match="of the job"):
        launch.run("evaluate", job)
