"""A folder of slices: what it gives back, and what a broken one says."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spg.core.checksums import is_whole
from spg.models.slices import (
    SLICES,
    describe_tensors,
    fill_from_slices,
    join_slices,
    named_tensors,
    read_shapes,
    write_slices,
)
from spg.models.weights import describe_checkpoint, read_checkpoint


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Let this process be a group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors() -> dict[str, Tensor]:
    """Return what a checkpoint of two weights holds."""
    return {
        "weights/policy.a": torch.arange(6.0).view(2, 3),
        "weights/policy.b": torch.arange(4).bfloat16(),
        "optimizer/0/0/step": torch.tensor(3.0),
        "optimizer/0/0/exp_avg": torch.full((2, 3), 0.5),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, alone: None) -> Path:
    """Return the file of a checkpoint with slices beside it."""
    write_slices(tmp_path / "some.slices", tensors())
    path = tmp_path / "last.ckpt"
    states = [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}]
    torch.save(
        {"spg": {"updates": 4}, "state_dict": {}, "optimizer_states": states, SLICES: "some.slices"}, path
    )
    return path


def test_a_checkpoint_in_slices_is_read_whole(checkpoint: Path) -> None:
    whole = read_checkpoint(checkpoint)
    assert SLICES not in whole
    assert whole["optimizer_states"][0]["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    found = named_tensors(whole)
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_its_tensors_are_described_without_being_read(checkpoint: Path) -> None:
    about = describe_checkpoint(checkpoint)
    assert about[SLICES] == checkpoint.parent / "some.slices"
    assert {name: tuple(t.shape) for name, t in about["state_dict"].items()} == {
        "policy.a": (2, 3),
        "policy.b": (4,),
    }
    assert all(t.is_meta for t in named_tensors(about).values())


def cut(folder: Path) -> None:
    """Leave half of a file."""
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(folder: Path) -> None:
    """Overwrite a file with zeros."""
    path = folder / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


class Program:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (exec, ("open('was_run', 'w')",))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "__0_0.distcp has been cut"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "No such file"),
        (lambda folder: (folder / ".metadata").unlink(), "No such file"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), "Ran out of input"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])), "not the description"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Program())), "does not belong in it"),
        (spoil, "can.t be read"),
        (shutil.rmtree, "No such file"),
    ],
)
def test_a_broken_folder_is_told_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], words: str
) -> None:
    folder = checkpoint.parent / "some.slices"
    monkeypatch.chdir(checkpoint.parent)
    damage(folder)
    with pytest.raises(ValueError, match=words) as raised:
        read_checkpoint(checkpoint)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("was_run").exists()


def test_tensors_that_a_folder_lacks_are_told(checkpoint: Path) -> None:
    folder = checkpoint.parent / "some.slices"
    assert read_shapes(folder).keys() == tensors().keys()
    with pytest.raises(ValueError, match=r"Missing key.*weights/policy\.c"):
        fill_from_slices(folder, {"weights/policy.c": torch.zeros(3)})
    with pytest.raises(ValueError, match="Size mismatch"):
        fill_from_slices(folder, {"weights/policy.a": torch.zeros(3)})


def test_each_file_of_a_folder_has_a_checksum(checkpoint: Path) -> None:
    folder = checkpoint.parent / "some.slices"
    assert is_whole(folder) is True
    for path in [folder / "__0_0.distcp", folder / ".metadata"]:
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        assert is_whole(folder) is False
        path.write_bytes(whole)


def test_a_folder_may_move_with_its_file(checkpoint: Path, tmp_path: Path) -> None:
    shutil.move(checkpoint.parent / "some.slices", tmp_path / "elsewhere" / "some.slices")
    moved = Path(shutil.move(checkpoint, tmp_path / "elsewhere" / "last.ckpt"))
    assert torch.equal(read_checkpoint(moved)["state_dict"]["policy.a"], tensors()["weights/policy.a"])


def test_a_full_disk_is_told_as_such(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_slices(tmp_path / "x.slices", tensors())
    assert raised.value.errno == 28


def test_joining_needs_a_description_first(checkpoint: Path) -> None:
    about: dict[str, Any] = {"state_dict": {}, "optimizer_states": [{"state": {}}]}
    describe_tensors(about, checkpoint.parent / "some.slices")
    join_slices(about)
    assert torch.equal(about["optimizer_states"][0]["state"][0]["step"], torch.tensor(3.0))
