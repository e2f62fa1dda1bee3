"""Whole runs on the pretended device: evaluation, checkpoints, resuming, and what is left for the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spg.cli.train import resume
from tests.fake.tensors import pretending
from tests.fake.toys import SMALL, sections
from tests.helpers import comparable, same_run, train_here

pytestmark = pytest.mark.fake

# completions of a batch of held-out examples: sizes; equal rows, before the first step and in it; rows that
# have ended; tokens; lengths and steps
EVALUATION = {
    "_counts: copy to the CPU": 1,
    "distinct_rows: unique_dim": 2,
    "Decoder._decode: tolist": 1,
    "Policy.texts: copy to the CPU": 1,
    "Completer.__call__: tolist": 1,
}
RUN = (*SMALL, "trainer.max_updates=4", "trainer.checkpoint_every=2")


@pytest.mark.parametrize("adapter", [[], ["model/lora=paper"]])
def test_a_run_is_that_of_the_cpu_and_goes_on(adapter: list[str], tmp_path: Path) -> None:
    whole, cut, cpu = tmp_path / "whole", tmp_path / "cut", tmp_path / "cpu"
    with pretending(), sections() as found:
        train_here(whole, *RUN, *adapter, "trainer.accelerator=cuda")
        assert all(waits == EVALUATION for waits in found.waits("evaluation"))
        train_here(cut, *RUN, *adapter, "trainer.accelerator=cuda", "trainer.max_updates=2")
        resume(str(cut), ["trainer.max_updates=4"])
    assert len(found.calls["evaluation"]) > 4
    assert same_run(whole, cut)
    train_here(cpu, *RUN, *adapter, "trainer.accelerator=cpu")
    for ours, theirs in zip(comparable(whole), comparable(cpu), strict=True):
        for name, value in theirs.items():
            assert (ours[name] == value) or float(ours[name]) == pytest.approx(float(value), abs=1e-5), name
    file = "adapter/adapter_model.safetensors" if adapter else "weights.safetensors"
    weights, expected = load_file(whole / file), load_file(cpu / file)
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(tmp_path: Path) -> None:
    with pretending():
        train_here(tmp_path, *RUN, "trainer.accelerator=auto", "trainer.max_updates=2")
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    assert checkpoint["spg"]["updates"] == 2
    resume(str(tmp_path), ["trainer.max_updates=4"])
    assert len(comparable(tmp_path)) > 4
