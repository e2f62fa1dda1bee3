"""Nothing is lost: kills, interruptions, full disks, broken files, and numbers that are none."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.checksums import is_whole
from spg.core.errors import Interrupted, RunError
from spg.core.files import read_csv
from spg.runs.status import lock, read_status, write_status
from spg.training.reproduce import reproduce
from tests import faults, warm
from tests.helpers import QUICK, ROOT, command, comparable, run, same_run, train_here

LONG_RUN = (*QUICK, "trainer.max_updates=24")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of 24 updates that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run("train", *LONG_RUN, folder=folder)
    return folder


def kill_at(folder: Path, update: int, delay: float) -> None:
    """Start (or go on with) the run in `folder` and kill it `delay` seconds after `update` is logged."""
    line = command("train", *LONG_RUN, f"hydra.run.dir={folder}")
    if (folder / "config.yaml").exists():
        line = command("train", f"resume={folder}")
    process = warm.Popen(line, cwd=ROOT)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        rows = read_csv(folder / "metrics.csv") if (folder / "metrics.csv").exists() else []
        if rows and int(rows[-1]["update"]) >= update:
            break
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.wait()


@pytest.mark.long
def test_killed_at_random_and_resumed_it_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    dice = random.Random(time.time_ns())
    update, delay = dice.randrange(1, 20), dice.random() * 0.3
    kill_at(folder, update, delay)
    assert not (folder / "summary.json").exists(), "killed before its end"
    assert read_status(folder)["state"] == "running"
    text = run("train", f"resume={folder}")
    assert same_run(whole, folder), f"killed {delay:.3f} s after update {update}"
    assert read_status(folder)["state"] == "finished"
    assert "Run directory" in text
    ours, theirs = (json.loads((p / "summary.json").read_text()) for p in (folder, whole))
    for key, value in theirs.items():
        if not key.startswith("seconds") and key != "best.checkpoint":
            assert ours[key] == value, key


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 3])
def test_killed_while_a_checkpoint_is_written(whole: Path, tmp_path: Path, number: int) -> None:
    """The first time there is none yet, so that the run begins anew; both times it is the same run."""
    folder = tmp_path / "killed"
    run("tests.faults", f"killed_while_saving={number}", "spg.train", *LONG_RUN, folder=folder, check=False)
    staged = [path.name for path in (folder / "checkpoints").iterdir() if path.suffix == ".tmp"]
    assert len(staged) == 1, "half a file is there, under its temporary name"
    assert (folder / "checkpoints" / "last.ckpt").exists() == (number > 1)
    resume(str(folder), [])
    assert same_run(whole, folder)
    assert not [path for path in (folder / "checkpoints").iterdir() if path.suffix == ".tmp"]


@pytest.mark.long
@pytest.mark.parametrize("number", range(8))
def test_killed_again_and_again(whole: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "killed"
    dice = random.Random(number)
    for update in sorted(dice.sample(range(24), 3)):
        kill_at(folder, update, dice.random() * 0.4)
    if not (folder / "summary.json").exists():
        run("train", f"resume={folder}")
    assert same_run(whole, folder)


@pytest.mark.long
def test_ctrl_c_saves_and_says_how_to_go_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    line = command("tests.faults", "interrupted=14", "spg.train", *LONG_RUN, f"hydra.run.dir={folder}")
    done = warm.run(line, cwd=ROOT)
    assert done.returncode == 130
    assert f"stopped after update 16, which is saved; go on with: python -m spg.train resume={folder}" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert read_status(folder)["state"] == "interrupted"
    assert len(comparable(folder)) == 17
    resume(str(folder), [])
    assert same_run(whole, folder)


def test_ctrl_c_twice_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    faults.interrupted("6", monkeypatch.setattr)
    faults.interrupted("6", monkeypatch.setattr)
    with pytest.raises(Interrupted, match="stopped at once; go on with: python -m spg"):
        train_here(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before, "the signal is given back"
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt")["spg"]["updates"] == 4


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Directory of a run that was interrupted in the middle."""
    stop_after(4, tmp_path / "run")
    return tmp_path / "run"


def stop_after(update: int, folder: Path, *overrides: str) -> None:
    """Start a run and interrupt it after an update."""
    with pytest.MonkeyPatch.context() as patch:
        faults.interrupted(str(update), patch.setattr)
        with pytest.raises(Interrupted):
            train_here(folder, *overrides)


def everything(folder: Path) -> dict[str, bytes]:
    """Return all files below `folder` but the lock, the log and the status, with their contents."""
    left_out = {".lock", "train.log", "status.json"}
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in left_out}


def break_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_foreign(path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 3}, path)


def of_another_run(path: Path) -> None:
    checkpoint = torch.load(path)
    checkpoint["spg"]["identity"]["seed"] = "17"
    torch.save(checkpoint, path)


def of_another_model(path: Path) -> None:
    checkpoint = torch.load(path)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = torch.zeros(2, 2)
    torch.save(checkpoint, path)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    (break_in_half, "can't be read as a checkpoint"),
    (lambda path: path.write_bytes(b""), "can't be read as a checkpoint"),
    (lambda path: path.write_text("hello"), "can't be read as a checkpoint"),
    (make_foreign, "is not a checkpoint of spg.train"),
    (flip_a_byte, "is broken: it does not have the checksum that was stored when it was written"),
]


@pytest.mark.parametrize(("spoil", "words"), DAMAGES)
def test_a_broken_checkpoint_is_noticed_and_nothing_overwritten(stopped: Path, spoil, words: str) -> None:
    """No other one is there; the user may also name it."""
    last = stopped / "checkpoints" / "last.ckpt"
    (stopped / "checkpoints" / "best.ckpt").unlink()
    spoil(last)
    before = everything(stopped)
    for target in (stopped, last):
        with pytest.raises(RunError, match=words):
            resume(str(target), [])
        assert everything(stopped) == before


@pytest.mark.parametrize(
    "spoil",
    [pytest.param(damage[0], marks=pytest.mark.long) for damage in DAMAGES],
)
def test_the_run_goes_on_from_the_newest_whole_checkpoint(
    tmp_path: Path, spoil, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    stop_after(8, folder, "trainer.max_updates=12", "trainer.keep_every=4", "trainer.validate_every=12")
    saved = folder / "checkpoints"
    assert {path.name for path in saved.glob("*.ckpt")} == {
        "last.ckpt",
        "update-000004.ckpt",
        "update-000008.ckpt",
    }
    spoil(saved / "last.ckpt")
    flip_a_byte(saved / "update-000008.ckpt")
    resume(str(folder), [])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"{saved / 'last.ckpt'} ")
    assert line.endswith("; going on from update-000004.ckpt, of update 4")
    assert read_status(folder)["state"] == "finished"
    assert [row["update"] for row in comparable(folder)] == [str(update) for update in range(13)]
    assert all(is_whole(saved / name) for name in ("last.ckpt", "update-000008.ckpt", "best.ckpt"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (of_another_run, "belongs to a run with seed=17, this one has seed=0"),
        (of_another_model, "does not fit the model: policy.network"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_overwritten(
    stopped: Path, spoil, words: str
) -> None:
    """Checkpoints of version 0.5 have no checksum."""
    spoil(stopped / "checkpoints" / "last.ckpt")
    (stopped / "checkpoints" / "last.ckpt.sha256").unlink()
    before = everything(stopped)
    with pytest.raises(RunError, match=words):
        resume(str(stopped), [])
    assert everything(stopped) == before
    # the remedy that the message names
    resume(str(stopped / "checkpoints" / "best.ckpt"), [])
    assert read_status(stopped)["state"] == "finished"


def test_metrics_that_do_not_reach_the_checkpoint_are_refused(stopped: Path) -> None:
    break_in_half(stopped / "metrics.csv")
    before = everything(stopped)
    with pytest.raises(RunError, match="has no row of update 4"):
        resume(str(stopped), [])
    assert everything(stopped) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=1"], r"seed=1: a run goes on with its own settings \(seed=0"),
        (["beta=2", "trainer.max_updates=40"], "allowed: trainer.max_updates"),
        (["estimator=elbo"], "estimator=elbo: beside resume=... only these are taken"),
        (["trainer.max_update=null"], r"nearest: trainer\.max_updates"),
        (["trainer.max_updates=none"], "trainer.max_updates=none: out of range"),
    ],
)
def test_a_changed_configuration_is_refused(stopped: Path, overrides: list[str], words: str) -> None:
    before = everything(stopped)
    with pytest.raises(ConfigError, match=words):
        resume(str(stopped), overrides)
    assert everything(stopped) == before


def test_options_of_the_command_line_are_refused_beside_resume(stopped: Path) -> None:
    text = run("train", f"resume={stopped}", "--multirun", check=False)
    assert text.strip() == "--multirun can't be given together with resume=...; leave it out"
    assert read_status(stopped)["state"] == "interrupted"


def test_a_finished_run_stays_one_when_a_resume_is_refused(tmp_path: Path) -> None:
    folder = train_here(tmp_path / "run", "trainer.max_updates=4", "task.eval_size=4")
    make_foreign(folder / "checkpoints" / "other.ckpt")
    with pytest.raises(RunError, match="is not a checkpoint"):
        resume(str(folder / "checkpoints" / "other.ckpt"), [])
    assert read_status(folder)["state"] == "finished"


@pytest.mark.long
def test_a_row_that_a_kill_cut_short_is_dropped(stopped: Path, tmp_path: Path) -> None:
    with (stopped / "metrics.csv").open("a") as file:
        file.write("1")  # of row 12, say
    resume(str(stopped), [])
    assert same_run(train_here(tmp_path / "whole"), stopped)


@pytest.mark.long
def test_killed_before_the_first_last_checkpoint_it_goes_on_from_the_best(
    stopped: Path, tmp_path: Path
) -> None:
    """The best one is written first, so that for a moment there is no other."""
    (stopped / "checkpoints" / "last.ckpt").unlink()
    resume(str(stopped), [])
    assert same_run(train_here(tmp_path / "whole"), stopped)


@pytest.mark.long
def test_sigterm_in_the_first_evaluation_stops_after_the_first_rollout(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        faults.terminated_at_first_evaluation("", patch.setattr)
        with pytest.raises(Interrupted, match="stopped after update 4, which is saved; go on with"):
            train_here(tmp_path / "run")
    resume(str(tmp_path / "run"), [])
    assert same_run(train_here(tmp_path / "whole"), tmp_path / "run")


def test_an_edited_configuration_is_refused(stopped: Path) -> None:
    path = stopped / "config.yaml"
    path.write_text(path.read_text().replace("mu: 4", "mu: 2"))
    with pytest.raises(RunError, match="belongs to a run with mu=4, this one has mu=2"):
        resume(str(stopped), [])


@pytest.mark.long
def test_more_updates_are_the_longer_run(tmp_path: Path) -> None:
    """A run that ended is trained on, as one that had been that long from the start."""
    short = train_here(tmp_path / "short", "trainer.max_updates=4")
    with pytest.raises(ConfigError, match=r"is finished; train on with a higher trainer\.max_updates than 4"):
        resume(str(short), [])
    resume(str(short), ["trainer.max_updates=8"])
    assert same_run(train_here(tmp_path / "long", "trainer.max_updates=8"), short)
    assert "max_updates: 8" in (short / "config.yaml").read_text()


def test_fewer_updates_than_were_done_are_refused(stopped: Path) -> None:
    before = everything(stopped)
    with pytest.raises(RunError, match=r"has done 4 updates already, but trainer\.max_updates=2"):
        resume(str(stopped), ["trainer.max_updates=2"])
    assert everything(stopped) == before


@pytest.mark.long
def test_killed_after_the_last_update_it_still_gets_its_summary(tmp_path: Path) -> None:
    """Nothing is left to train; evaluation, weights and summary are made."""
    folder = train_here(tmp_path / "run")
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    for name in ("summary.json", "weights.safetensors", "curve.png"):
        (folder / name).unlink()
    write_status(folder, state="running")
    resume(str(folder), [])
    assert same_run(whole, folder)
    summaries = [json.loads((p / "summary.json").read_text()) for p in (whole, folder)]
    for key in ("accuracy.before", "accuracy.after", "accuracy.last", "best.update", "rollouts"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.long
def test_from_a_checkpoint_that_was_kept(tmp_path: Path) -> None:
    first = train_here(tmp_path / "run", "trainer.max_updates=12", "trainer.keep_every=4")
    copied = tmp_path / "copy"
    shutil.copytree(first, copied)
    assert (first / "checkpoints" / "update-000012.ckpt").is_file()
    resume(str(first / "checkpoints" / "update-000004.ckpt"), [])
    assert same_run(copied, first)
    assert (first / "checkpoints" / "replaced.ckpt").is_file(), "the later one is not thrown away"


@pytest.mark.long
def test_going_back_forgets_a_best_checkpoint_that_is_no_longer_of_the_run(tmp_path: Path) -> None:
    """What the summary reports at the best update is that update's model."""
    lines = (
        "trainer.max_updates=12",
        "trainer.keep_every=4",
        "optimizer.lr=1e-3",
        "trainer.validate_every=4",
    )
    folder = train_here(tmp_path / "run", *lines)
    saved = folder / "checkpoints"
    shutil.copyfile(saved / "update-000012.ckpt", saved / "best.ckpt")  # as if it had been the best
    later = saved / "best.ckpt"
    assert torch.load(later)["spg"]["updates"] == 12
    resume(str(saved / "update-000004.ckpt"), ["trainer.max_updates=4"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best.update"] == 4
    assert summary["accuracy.after"] == summary["accuracy.last"], "both are of update 4"
    assert torch.load(saved / "best.ckpt")["spg"]["updates"] == 4
    assert torch.load(saved / "replaced-best.ckpt")["spg"]["updates"] == 12


def test_a_run_is_not_started_over_another(stopped: Path) -> None:
    before = everything(stopped)
    with pytest.raises(ConfigError, match="holds a run already; go on with it"):
        train_here(stopped)
    assert everything(stopped) == before


def test_two_at_work_on_one_run_are_refused(stopped: Path) -> None:
    with lock(stopped), pytest.raises(RunError, match="is in use"):
        resume(str(stopped), [])


def test_no_run_to_resume(tmp_path: Path) -> None:
    text = run("train", f"resume={tmp_path}", check=False)
    assert "is not the directory of a run" in text
    assert text.strip().count("\n") == 0


@pytest.mark.long
def test_a_full_disk_is_told_and_leaves_what_was_saved(tmp_path: Path) -> None:
    """A checkpoint has two megabytes, all else is smaller."""
    folder = tmp_path / "run"
    whole = train_here(tmp_path / "whole")
    stop_after(4, folder)
    before = everything(folder / "checkpoints")
    done = warm.run(command("tests.faults", "full_disk=1000", "spg.train", f"resume={folder}"), cwd=ROOT)
    assert done.returncode == 1, done.stderr
    told, how = done.stderr.splitlines()
    assert "could not be written" in told
    assert how == f"Go on with: python -m spg.train resume={folder}"
    assert everything(folder / "checkpoints") == before
    resume(str(folder), [])
    assert same_run(whole, folder)


@pytest.mark.parametrize(
    ("fault", "value", "words", "again"),
    [
        ("reward_is_nan", "200", "the reward of update 5 is not a finite number", False),
        pytest.param(
            *("loss_is_inf", "7", "the loss of update 7 is not a finite number", True),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("gradient_is_nan", "6", "the gradient of update 6 is not a finite number", True),
            marks=pytest.mark.long,
        ),
    ],
)
def test_no_number_stops_the_run_before_a_checkpoint(
    tmp_path: Path, fault: str, value: str, words: str, again: bool
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        getattr(faults, fault)(value, patch.setattr)
        with pytest.raises(RunError, match=words) as caught:
            train_here(folder)
        (file,) = folder.glob("nonfinite-update-*.pt")
        assert str(file) in str(caught.value)
        record = torch.load(file, weights_only=True)
        update = record["update"]
        if again:
            assert reproduce(file), "seen again while the fault is there"
    assert f"update {update} " in str(caught.value)
    (culprit,) = record["culprits"]
    assert culprit[0]["puzzle"] in str(caught.value), "the example is named"
    texts = record["parts"][0]["experience"]["rollout"]["texts"]
    assert culprit[1] == texts[{"loss_is_inf": 2, "gradient_is_nan": 5}.get(fault, 200 - 128)]
    if again:
        assert not reproduce(file), "and not without it"
    last = torch.load(folder / "checkpoints" / "last.ckpt")
    assert last["spg"]["updates"] == 4
    assert all(bool(t.isfinite().all()) for t in last["state_dict"].values())
    assert read_status(folder)["state"] == "failed"
    resume(str(folder), [])  # the fault was planted: without it the run goes on
    assert read_status(folder)["state"] == "finished"


@pytest.mark.long
def test_the_process_ends_as_the_shell_expects(tmp_path: Path) -> None:
    """A run that some signal stops at its own end leaves nothing half done."""
    process = warm.Popen(
        command("train", *QUICK, "trainer.max_updates=400", f"hydra.run.dir={tmp_path / 'run'}"), cwd=ROOT
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    text = "".join(process.communicate(timeout=60))
    assert process.returncode == 130, text
    assert "which is saved; go on with" in text
