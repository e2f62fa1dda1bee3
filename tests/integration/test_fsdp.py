"""Weights in slices, one a process: the update of a single process, and files that any process can read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spg import config
from spg.models.weights import read_checkpoint
from spg.runs.status import read_status
from tests.helpers import QUICK, ROOT, command, comparable, run, same_run, train_here
from tests.integration.test_parallel import SMALL, close

FSDP = ("trainer=fsdp", "trainer.accelerator=cpu")
TWO = (*FSDP, "trainer.devices=2")
# one of two processes has nothing to learn from in some update, and pieces are of unlike number
UNLIKE = (
    "algorithm.objective.loss_norm=batch",
    "estimator=eubo",
    "trainer.prompts_per_rollout=2",
    "trainer.micro_batch_size=3",
    "group_size=2",
    "seed=4",
)


def same_checkpoints(one: Path, two: Path) -> None:
    """Check that two runs' last checkpoints have the same form, and the same tensors up to rounding."""
    first, second = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (one, two))
    assert first.keys() == second.keys()
    assert first["state_dict"].keys() == second["state_dict"].keys()
    states = [checkpoint["optimizer_states"][0] for checkpoint in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for name, tensor in first["state_dict"].items():
        assert type(second["state_dict"][name]) is torch.Tensor
        torch.testing.assert_close(second["state_dict"][name], tensor, rtol=0, atol=1e-6)
    for number, entry in states[0]["state"].items():
        for name, tensor in entry.items():
            torch.testing.assert_close(states[1]["state"][number][name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.long
def test_two_processes_with_slices_give_the_update_of_one(tmp_path: Path) -> None:
    lines = [*QUICK, *SMALL, *UNLIKE]
    run("train", *lines, *TWO, folder=tmp_path / "two")
    train_here(tmp_path / "one", *lines)
    close(tmp_path / "one", tmp_path / "two")
    same_checkpoints(tmp_path / "one", tmp_path / "two")
    assert "0.5" in {row["frac_reward_zero_std"] for row in comparable(tmp_path / "two")}
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two")]
    for name in ("parameters", "parameters.trained", "accuracy.after", "accuracy.last"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], abs=1e-9)


@pytest.mark.long
def test_one_process_with_slices_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was resumed equals the run that was not, bit for bit: weights, optimizer, best checkpoint."""
    lines = [*FSDP, "trainer.devices=1", *SMALL, "trainer.validate_every=2"]
    train_here(tmp_path / "whole", *lines)
    train_here(tmp_path / "parts", *lines, "trainer.max_updates=2")
    text = run("train", f"resume={tmp_path / 'parts'}", "trainer.max_updates=4")
    assert "Going on after update 2" in text
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    train_here(tmp_path / "plain", *SMALL, "trainer.validate_every=2")
    same_checkpoints(tmp_path / "plain", tmp_path / "parts")


@pytest.mark.long
def test_weights_are_float32_where_the_computation_is_not(tmp_path: Path) -> None:
    lines = [*SMALL, "trainer.max_updates=2", "task.eval_size=4", "model.precision=bf16-mixed"]
    folder = train_here(tmp_path / "run", *FSDP, "trainer.devices=1", *lines)
    weights = load_file(folder / "weights.safetensors")
    kept = read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
    for name, tensor in weights.items():
        assert torch.equal(tensor, kept[f"policy.network.{name}"])
    wide = weights["model.transformer.wte.weight"]
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, wide.bfloat16().float())


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_with_a_reference_model_and_slices_of_unlike_size(tmp_path: Path, processes: int) -> None:
    """64 rows in three slices; the reference is whole in every process."""
    lines = [
        *QUICK,
        *SMALL,
        "trainer.prompts_per_rollout=6",
        "trainer.micro_batch_size=37",
        "advantage=shifted",
        "algorithm.objective.kl_coef=0.01",
    ]
    run("train", *lines, *FSDP, f"trainer.devices={processes}", folder=tmp_path / "several")
    train_here(tmp_path / "one", *lines)
    close(tmp_path / "one", tmp_path / "several")
    same_checkpoints(tmp_path / "one", tmp_path / "several")


@pytest.mark.long
def test_an_interrupted_run_goes_on_and_its_checkpoint_is_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    lines = [*QUICK, *SMALL, *TWO, f"hydra.run.dir={folder}"]
    done = subprocess.run(
        command("tests.faults", "interrupted=2", "spg.train", *lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 130, done.stdout + done.stderr
    assert "stopped after update 2, which is saved" in done.stderr
    run("train", f"resume={folder}")
    train_here(tmp_path / "one", *SMALL)
    close(tmp_path / "one", folder)
    same_checkpoints(tmp_path / "one", folder)
    assert "accuracy" in run("evaluate", f"run={folder}", "threads=1", folder=tmp_path / "evaluation")


@pytest.mark.long
@pytest.mark.parametrize("fault", ["gradient_is_nan=2", "loss_is_inf=2", "reward_is_nan=9"])
def test_a_number_that_is_none_ends_all_processes_and_is_seen_again(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "two"
    text = run("tests.faults", fault, "spg.train", *QUICK, *SMALL, *TWO, folder=folder, check=False)
    assert "is not a finite number" in text
    assert "Traceback" not in text
    assert read_status(folder)["state"] == "failed"
    (path,) = folder.glob("nonfinite-update-*.pt")
    weights = torch.load(path)["weights"]
    assert weights["network.model.transformer.wte.weight"].shape == (32, 64)
    assert "of update" in run("reproduce", f"file={path}", check=False)


def test_an_adapter_is_refused() -> None:
    with pytest.raises(config.ConfigError, match=r"trainer=fsdp .* model\.lora=null"):
        config.compose("config", [*QUICK, *TWO, "model.lora=default"])
