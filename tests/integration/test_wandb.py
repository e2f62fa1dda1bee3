"""Weights & Biases: offline where there is no account, one run through interruptions, groups of multiruns."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.wandb_config import Config

from spg.core.files import read_csv
from spg.training import loggers
from tests import warm
from tests.helpers import QUICK, ROOT, command

TINY = (*QUICK, "logger=wandb", "task.eval_size=8", "trainer.prompts_per_rollout=2")
BLOCK = 32768


def records(offline: Path) -> Iterator[Record]:
    """Yield what W&B wrote to an offline run's folder: a LevelDB log of protobuf messages."""
    (file,) = offline.glob("run-*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, message = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no chunk begins at the very end of a block
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(message)
            message = b""


def run_record(offline: Path) -> Any:
    (found,) = [record.run for record in records(offline) if record.WhichOneof("record_type") == "run"]
    return found


def logged_config(offline: Path) -> dict[str, Any]:
    """Return the configuration that W&B shows for the run."""
    changes = [run_record(offline).config]
    changes += [record.config for record in records(offline) if record.WhichOneof("record_type") == "config"]
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for c in changes for item in c.update}


def history(offline: Path) -> dict[int, dict[str, Any]]:
    """Return what was logged, by the update, which is the x axis."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records(offline):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.setdefault(row["trainer/global_step"], {}).update(row)
    return rows


def without_account(home: Path) -> dict[str, str]:
    """Return an environment in which W&B finds no account, and no network to ask for one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    nowhere = "http://127.0.0.1:9"
    return environment | {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_BASE_URL": nowhere}


def call(line: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command with nobody at the keyboard."""
    done = warm.run(line, env=environment, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Directory of a run without an account that was interrupted and resumed, and what both printed."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "run"
    line = command("tests.faults", "interrupted=4", "spg.train", *TINY, f"hydra.run.dir={folder}")
    code, first = call(line, without_account(home))
    assert code == 130, first
    line = command("train", f"resume={folder}", "trainer.max_updates=12")
    code, second = call(line, without_account(home))
    assert code == 0, second
    return folder, first, second


def offline_folders(folder: Path) -> list[Path]:
    """Return the offline folders of a run in the order in which they were begun."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def test_without_an_account_it_logs_offline_and_says_how_to_send_it(
    resumed: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder, *texts = resumed
    for text in texts:
        assert "Traceback" not in text
        assert "warn" not in text.lower()
        (line,) = [line for line in text.splitlines() if "W&B" in line]
        _, _, told = line.partition("no account found, logging offline; to send it: ")
        assert told == f"wandb sync {folder}/wandb/offline-*"
    # what the line says, as a shell takes it
    program = shlex.join([sys.executable, "-m", "wandb"])
    done = subprocess.run(
        ["sh", "-c", f"{program} {told.removeprefix('wandb ')} --dry-run"],
        env=without_account(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Would sync 2 run(s)" in done.stdout + done.stderr


def test_a_resumed_run_is_one_run_in_two_folders(resumed: tuple[Path, str, str]) -> None:
    folder = resumed[0]
    first, second = (run_record(offline) for offline in offline_folders(folder))
    assert first.run_id == second.run_id == (folder / "wandb_id").read_text().strip()
    assert first.display_name == second.display_name == folder.name
    assert (first.project, first.run_group) == ("spg", "")
    assert second.resume, "by this `wandb sync` appends to what it sent, instead of replacing it"


def test_the_configuration_is_the_runs(resumed: tuple[Path, str, str]) -> None:
    first, second = (logged_config(offline) for offline in offline_folders(resumed[0]))
    settings = OmegaConf.to_container(OmegaConf.load(resumed[0] / "config.yaml"))
    assert isinstance(settings, dict)
    assert {key: second[key] for key in settings} == settings
    assert second["trainer"]["max_updates"] == 12
    assert first == second | {"_wandb": first["_wandb"], "trainer": second["trainer"] | {"max_updates": 8}}


def test_the_rows_are_those_of_metrics_csv(resumed: tuple[Path, str, str]) -> None:
    before, after = map(history, offline_folders(resumed[0]))
    rows = read_csv(resumed[0] / "metrics.csv")
    assert [int(row["update"]) for row in rows] == list(range(13))
    assert max(before) == 4
    assert min(after) == 5, "no row is lost, none is there twice"
    for row in rows:
        logged = (before | after)[int(row["update"])]
        expected = {name: float(value) for name, value in row.items() if value and name != "update"}
        assert {name: float(logged[name]) for name in expected} == expected
    assert {"bound/lower", "frac_reward_zero_std", "val/accuracy"} <= set(rows[0])
    assert before[4]["samples/nrows"] == 3, "the table of sample completions, which no CSV holds"


@pytest.mark.long
def test_the_jobs_of_a_multirun_are_runs_of_one_group(tmp_path: Path) -> None:
    """Where W&B's own variable asks for offline, it is respected; jobs share a process and are still two."""
    lines = ["-m", *TINY, "trainer.max_updates=2", "trainer.samples_every=0", "estimator=elbo,mixture"]
    line = command("train", *lines, f"hydra.sweep.dir={tmp_path / 'many'}")
    code, text = call(line, without_account(tmp_path) | {"WANDB_MODE": "offline"})
    assert code == 0, text
    assert "warn" not in text.lower()
    found = {}
    for name in ("elbo", "mixture"):
        folder = tmp_path / "many" / f"estimator-{name}"
        (offline,) = offline_folders(folder)
        found[name] = run_record(offline)
        assert found[name].run_group == "many"
        assert found[name].display_name == f"many/estimator-{name}"
        assert found[name].run_id == (folder / "wandb_id").read_text().strip()
        assert set(history(offline)) == {0, 1, 2}
        assert logged_config(offline)["estimator"]["_target_"].lower() == f"spg.algorithms.estimators.{name}"
        assert any(record.WhichOneof("record_type") == "exit" for record in records(offline)), "it was ended"
    assert found["elbo"].run_id != found["mixture"].run_id


def test_a_run_that_goes_on_online_may_have_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online, W&B brings the settings that it knows, and refuses to change one that it is not told to."""
    known = Config()
    known.update({"trainer": {"max_updates": 8}})
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.setup", lambda: None)
    monkeypatch.setattr("wandb.finish", lambda: None)
    made: dict[str, Any] = {}

    def logger(**arguments: Any) -> SimpleNamespace:
        made.update(arguments)
        return SimpleNamespace(experiment=SimpleNamespace(config=known))

    monkeypatch.setattr(loggers, "WandbLogger", logger)
    loggers.wandb_logger("spg", None, tmp_path, {"trainer": {"max_updates": 12}})
    assert known["trainer"] == {"max_updates": 12}
    assert made["resume"] == "allow"
    assert "mode" not in made, "W&B's own variable decides"
