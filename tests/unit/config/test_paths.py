"""Paths on the command line that Hydra would read as something else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from spg import config
from spg.cli import launch
from spg.core.commands import command_line


@pytest.mark.parametrize(
    ("line", "quoted"),
    [
        ("run=/a=b", "run='/a=b'"),
        ("run=/it's", r"run='/it\'s'"),
        ("+run=/a(1)", "+run='/a(1)'"),
        ("run=12", "run='12'"),
        ("hydra.run.dir=runs/x=1", "hydra.run.dir='runs/x=1'"),
        ("task.path=/a b", "task.path=/a b"),
        ("run=x,y", "run=x,y"),
        ("run='/a=b'", "run='/a=b'"),
        ("output=null", "output=null"),
        ("hydra.run.dir=runs/${seed}", "hydra.run.dir=runs/${seed}"),
        ("beta=1=2", "beta=1=2"),
        ("--multirun", "--multirun"),
    ],
)
def test_a_path_is_quoted_if_hydra_would_misread_it(line: str, quoted: str) -> None:
    assert config.quote_paths([line]) == [quoted]


def test_a_path_with_a_comma_is_one_path_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert config.quote_paths([f"run={tmp_path}/a,b"]) == [f"run='{tmp_path}/a,b'"]
    assert config.unquote(f"'{tmp_path}/a,b'") == f"{tmp_path}/a,b"


def test_a_value_that_can_t_be_read_is_shown_in_quotes() -> None:
    with pytest.raises(config.ConfigError, match=r"""beta=1=2 can't be read: .* quote it: "beta='1=2'\""""):
        config.preflight("config", ["beta=1=2"])


def test_paths_reach_the_job_and_resume_as_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    record = tmp_path / "a=b, (1).pt"
    for given in (f"file={record}", f"file='{record}'"):
        monkeypatch.setattr(sys, "argv", ["reproduce", given, f"hydra.run.dir={tmp_path}/out=1"])
        launch.run("reproduce", lambda cfg: seen.append(cfg.file))
    for given in (f"resume={record}", f"resume='{record}'"):
        monkeypatch.setattr(sys, "argv", ["train", given])
        launch.run("config", print, lambda path, overrides: seen.append(path))
    assert seen == [str(record)] * 4


def test_commands_are_quoted_for_the_shell() -> None:
    assert command_line("train", "resume=/a b") == "python -m spg.train 'resume=/a b'"
    assert command_line("evaluate", "run=/a", Path("x")) == "python -m spg.evaluate run=/a x"
