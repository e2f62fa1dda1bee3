"""The job of a command in another process."""

from __future__ import annotations

import os
import pickle

import pytest

from spg.cli import train
from spg.cli.job_function import JobFunction
from spg.core.errors import RunError


def test_another_process_gets_the_multirun_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPG_SWEEP", "beta")
    monkeypatch.setenv("SPG_RANK", "1")
    packed = pickle.dumps(JobFunction(train.job))
    for name in ("SPG_SWEEP", "SPG_RANK"):
        monkeypatch.delenv(name)
    assert pickle.loads(packed).job is train.job
    assert os.environ["SPG_SWEEP"] == "beta"
    assert "SPG_RANK" not in os.environ
    monkeypatch.setenv("SPG_SWEEP", "")


def test_errors_with_a_message_are_kept_and_others_are_raised() -> None:
    def fail(cfg: object) -> None:
        raise RunError("x") if cfg is None else ZeroDivisionError

    function = JobFunction(fail)
    function(None)  # type: ignore[arg-type]
    assert [str(error) for error in function.failures] == ["x"]
    with pytest.raises(ZeroDivisionError):
        function({})  # type: ignore[arg-type]
