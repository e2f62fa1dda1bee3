"""What processes of a launcher do with a command: see the same file, or refuse what one process does."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from spg.cli import processes
from spg.core import link
from spg.core.errors import InputError, RunError
from spg.core.files import digest
from spg.core.link import Hub, Member
from spg.runs.status import lock, read_status, record_death, write_status
from tests.unit.core.test_process import TORCHRUN


def test_the_others_wait_until_they_see_the_file_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    expected = [digest(b"old"), digest(b"new")]
    threading.Timer(0.3, path.write_bytes, [b"new"]).start()
    processes.check_same_file(path, expected, patience=5.0)
    path.write_bytes(b"another")
    with pytest.raises(RunError, match=r"config\.yaml is another file on .* that all nodes share"):
        processes.check_same_file(path, expected, patience=0.1)
    path.unlink()
    with pytest.raises(RunError, match="does not exist on"):
        processes.check_same_file(path, expected, patience=0.1)


def test_a_command_for_one_process_is_refused_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(InputError, match=r"spg\.evaluate works in one process, and torchrun started 4; "),
        processes.share("evaluate", None),
    ):
        pass
    with pytest.raises(InputError, match="a multirun can't be shared by the 4 processes that torchrun st"):
        processes.refuse_several("a multirun")


def test_another_process_takes_the_arguments_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_bytes(b"x")
    hub = Hub(2, "token", [0], "127.0.0.1")
    monkeypatch.setenv("SPG_RANK", "1")
    monkeypatch.setenv(link.VARIABLE, f"{hub.port} 2 token")
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setenv("MASTER_PORT", "1")
    hub.tell(
        file=str(tmp_path / "config.yaml"),
        digests=[digest(b"x")],
        arguments=["resume=here"],
        environment={"MASTER_PORT": "2"},
    )
    prepared = []
    with processes.share("train", lambda: prepared.append(1)):
        assert prepared
        assert processes.sys.argv == ["train", "resume=here"]
        assert os.environ["MASTER_PORT"] == "2"
        assert isinstance(link.current(), Member)
        assert processes.tell_first("no room\nhere")
    assert hub.died.wait(5.0)
    assert str(hub.dead).endswith("failed: no room")
    hub.end(1)
    assert link.current() is None
    assert not processes.tell_first("the first one speaks for itself")


def test_who_is_left_writes_that_the_run_failed_and_only_then(tmp_path: Path) -> None:
    write_status(tmp_path, state="running")
    with lock(tmp_path):
        assert not record_death(tmp_path, "gone"), "the first process lives"
    assert record_death(tmp_path, "gone")
    assert not record_death(tmp_path, "gone"), "another one has written it"
    assert read_status(tmp_path) == {"state": "failed", "error": "gone"}
    write_status(tmp_path, state="finished")
    assert not record_death(tmp_path, "gone")
