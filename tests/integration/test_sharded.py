"""Checkpoints in slices: what whole ones hold, on any number of processes, and whole at every moment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from spg import config
from spg.models.slices import named_tensors
from spg.models.weights import read_checkpoint
from spg.runs.status import read_status
from tests.helpers import QUICK, ROOT, command, run, same_run, train_here
from tests.integration.test_fsdp import FSDP, TWO, same_checkpoints
from tests.integration.test_parallel import SMALL, close

SHARDED = "trainer.checkpoint_format=sharded"
LINES = (*SMALL, "trainer.validate_every=2")


def same_files(one: Path, two: Path) -> None:
    """Check that two checkpoints hold the same, bit for bit."""
    first, second = read_checkpoint(one), read_checkpoint(two)
    assert first.keys() == second.keys()
    tensors, others = named_tensors(first), named_tensors(second)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    states = [checkpoint["optimizer_states"][0]["param_groups"] for checkpoint in (first, second)]
    assert states[0] == states[1]
    assert first["lr_schedulers"] == second["lr_schedulers"]


def folders(run: Path) -> set[str]:
    """Return the folders of slices of a run."""
    return {path.name for path in (run / "checkpoints").glob("*.slices")}


@pytest.mark.long
def test_slices_hold_what_a_whole_file_does(tmp_path: Path) -> None:
    """One process; its checkpoint is evaluated and exported, and the run goes on with whole files."""
    lines = [*FSDP, "trainer.devices=1", *LINES, "task.eval_size=4"]
    train_here(tmp_path / "whole", *lines)
    folder = train_here(tmp_path / "sliced", *lines, SHARDED, "trainer.max_updates=2")
    assert folders(folder) == {"update-000002-1.slices"}, "best.ckpt and last.ckpt are of one update"
    from spg.cli.train import resume

    resume(str(folder), ["trainer.max_updates=4", "trainer.checkpoint_format=whole"])
    assert same_run(tmp_path / "whole", folder)
    for name in ("best", "last"):
        same_files(*(tmp_path / n / "checkpoints" / f"{name}.ckpt" for n in ("whole", "sliced")))


@pytest.mark.long
def test_two_processes_write_slices_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    lines = [*QUICK, *TWO, *LINES]
    run("train", *lines, folder=tmp_path / "whole")
    run("train", *lines, SHARDED, folder=tmp_path / "sliced")
    assert same_run(tmp_path / "whole", tmp_path / "sliced")
    for name in ("best", "last"):
        same_files(*(tmp_path / n / "checkpoints" / f"{name}.ckpt" for n in ("whole", "sliced")))
    folder = tmp_path / "parts"
    run("train", *lines, SHARDED, "trainer.keep_every=2", "trainer.max_updates=2", folder=folder)
    run("train", f"resume={folder}", "trainer.max_updates=4")
    assert same_run(tmp_path / "whole", folder)
    # back to an earlier checkpoint, whose update is written anew
    run("train", f"resume={folder / 'checkpoints/update-000002.ckpt'}")
    assert same_run(tmp_path / "whole", folder)
    assert "update-000004-2.slices" in folders(folder)
    text = run("evaluate", f"run={folder}", "threads=1", folder=tmp_path / "evaluation")
    assert "checkpoints/best.ckpt" in text
    for n in ("whole", "parts"):
        run("export", f"run={tmp_path / n}", f"output={tmp_path / n / 'out'}")
    exported = [(tmp_path / n / "out" / "model.safetensors").read_bytes() for n in ("whole", "parts")]
    assert exported[0] == exported[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "after", [("auto", 1), ("fsdp", 1), ("fsdp", 3), ("ddp", 3)], ids=lambda after: f"{after[0]}-{after[1]}"
)
def test_another_number_of_processes_goes_on_with_slices(tmp_path: Path, after: tuple[str, int]) -> None:
    """Two halves are read by one process, and by three, whose slices are of unlike size."""
    lines = [*QUICK, *LINES, "trainer.prompts_per_rollout=6"]
    strategy, processes = after
    folder = tmp_path / "several"
    run("train", *lines, *TWO, SHARDED, "trainer.max_updates=2", folder=folder)
    kind = "sharded" if strategy == "fsdp" else "whole"
    changes = [f"trainer.strategy={strategy}", f"trainer.devices={processes}"]
    text = run(
        "train",
        f"resume={folder}",
        "trainer.max_updates=4",
        *changes,
        f"trainer.checkpoint_format={kind}",
    )
    assert f"{processes} processes go on with the work of 2: rounding changes" in text
    train_here(tmp_path / "one", *lines, "trainer.accelerator=cpu")
    close(tmp_path / "one", folder)
    same_checkpoints(tmp_path / "one", folder)


@pytest.mark.long
def test_a_run_killed_while_it_writes_slices_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL at each moment of a writing: its own file, the description, the file that names the folder."""
    lines = [*QUICK, *TWO, *LINES, SHARDED, "trainer.max_updates=8", "task.eval_size=8"]
    run("train", *lines, folder=tmp_path / "whole")
    folder = tmp_path / "killed"
    target = ["spg.train", *lines, f"hydra.run.dir={folder}"]
    for moment in ("1-begun", "1-written", "2-described", "1-named", "1-replaced", "2-removing"):
        done = subprocess.run(
            command("tests.faults", f"killed_while_writing_slices={moment}", *target),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == -9, (moment, done.stdout + done.stderr)
        target = ["spg.train", f"resume={folder}"]
        for path in (folder / "checkpoints").glob("*.ckpt"):
            read_checkpoint(path)
    run("train", f"resume={folder}")
    assert same_run(tmp_path / "whole", folder)
    named = {torch.load(path)["slices"] for path in (folder / "checkpoints").glob("*.ckpt")}
    assert folders(folder) == named, "what was begun is gone"


@pytest.mark.long
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    lines = [*QUICK, *TWO, *LINES, SHARDED, "trainer.max_updates=2"]
    run("train", *lines, folder=folder)
    target = ["spg.train", f"resume={folder}", "trainer.max_updates=4"]
    text = run("tests.faults", "full_disk=600", *target, check=False)
    assert "could not be written (File too large)" in text
    assert "Traceback" not in text
    assert read_status(folder)["state"] == "failed"
    read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert folders(folder) == {"update-000002-1.slices"}


@pytest.mark.long
def test_a_broken_folder_is_told_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", *QUICK, *TWO, *LINES, SHARDED, "trainer.max_updates=2", folder=folder)
    (slices,) = (folder / "checkpoints").glob("*.slices")
    (slices / "__1_0.distcp").unlink()
    before = (folder / "metrics.csv").read_bytes()
    text = run("train", f"resume={folder}", "trainer.max_updates=4", check=False)
    assert f"the slices in {slices} can't be read" in text
    assert "nothing was changed" in text
    assert "Traceback" not in text
    assert (folder / "metrics.csv").read_bytes() == before
    text = run("evaluate", f"run={folder}", folder=tmp_path / "evaluation", check=False)
    assert "can't be read" in text
    assert "Traceback" not in text


def test_slices_are_for_weights_in_slices() -> None:
    with pytest.raises(config.ConfigError, match=r"checkpoint_format=sharded is for .*give trainer=fsdp"):
        config.compose("config", [*QUICK, "trainer=ddp", SHARDED])
    assert config.compose("config", [*QUICK, *TWO, SHARDED]).trainer.checkpoint_format == "sharded"
