"""Tensors of a checkpoint in slices: a folder in which each process of a run writes a file of its own.

The folders are PyTorch's distributed checkpoints (`torch.distributed.checkpoint`). Any number of processes
reads them, each only what it needs, and a single process reads whole tensors. The file of the checkpoint
holds everything else, and the name of the folder beside it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from spg.core.checksums import SummingWriter, write_manifest
from spg.core.world import World

_DESCRIPTION = ".metadata"
# key of a checkpoint that names the folder
SLICES = "slices"
# name of a weight in a folder: this before its name in the module
WEIGHT = "weights/"

# all that the description of a folder is made of; unpickling anything else could run a program
_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float64", "float32", "bfloat16", "float16", "int64", "uint8", "bool")),
}
# what reading files that are missing, torn or of something else raises
_BROKEN = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ImportError,
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in it")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / _DESCRIPTION
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is not the description of a checkpoint")
        return metadata


class _SummedFile(SummingWriter):
    """A file that `torch.distributed.checkpoint` writes to, and closes more than once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._length = 0
        self._digest: str | None = None

    def write(self, data: bytes | memoryview) -> int:
        self._length += super().write(data)
        return len(data)

    def tell(self) -> int:
        return self._length

    def fileno(self) -> int:
        self._file.flush()  # what is synced next is the whole file
        return self._file.fileno()

    def close(self) -> str:
        if self._digest is None:
            self._digest = super().close()
        return self._digest


class _SummedFiles(FileSystem):
    """Files with their checksums by their names."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb"
        file = _SummedFile(Path(path))
        try:
            yield file
        finally:
            self.sums[Path(path).name.removesuffix(".tmp")] = file.close()


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = _SummedFiles()
        self.fs = self.files

    def storage_meta(self) -> StorageMeta | None:
        return None  # it would hold the folder's path, and folders may move


def optimizer_name(optimizer: int, number: int, entry: str) -> str:
    """Return the name in a folder of an entry of an optimizer's state for parameter `number`."""
    return f"optimizer/{optimizer}/{number}/{entry}"


def write_slices(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors [...] to a new folder, each process its slices; every process must call this.

    What all processes hold alike is written once. Each process computes the checksum of its own file, and the
    first one writes them into the folder.

    Raises:
        OSError: in all processes, if one of them can't write.
    """
    writer = _Writer(folder)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        cause = next((one for one in failures if isinstance(one, OSError)), failures[0])
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause)) from error
        raise cause from error
    world = World(dist.get_rank(), dist.get_world_size())
    sums = dict(world.gather_items(list(writer.files.sums.items())))
    if world.rank == 0:
        write_manifest(folder, sums)


def read_shapes(folder: Path) -> dict[str, Tensor]:
    """Return what a folder holds: tensors [...] on the meta device, by their names.

    Raises:
        ValueError: if a file of the folder is missing, or shorter than it was.
    """
    try:
        metadata = _Reader(folder).read_metadata()
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), end)
        for name, end in ends.items():
            if (folder / name).stat().st_size < end:
                raise ValueError(f"{name} has been cut")
        return {name: _meta(about) for name, about in metadata.state_dict_metadata.items()}
    except _BROKEN as error:
        raise _error(folder, error) from error


def fill_from_slices(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors [...], whole or sliced over processes, from a folder; each process reads on its own.

    Raises:
        ValueError: if the folder is broken, or does not hold them.
    """
    reader, planner = _Reader(folder), DefaultLoadPlanner()
    try:
        metadata = reader.read_metadata()
        planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except _BROKEN as error:
        raise _error(folder, error) from error


def describe_tensors(checkpoint: dict[str, Any], folder: Path) -> None:
    """Put the tensors of a folder into a checkpoint as tensors on the meta device, and the folder's path."""
    checkpoint[SLICES] = folder
    for name, tensor in read_shapes(folder).items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            optimizer, number, entry = rest.split("/", 2)
            states = checkpoint["optimizer_states"][int(optimizer)]["state"]
            states.setdefault(int(number), {})[entry] = tensor
        else:
            checkpoint["state_dict"][rest] = tensor


def named_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors [...] of a checkpoint by the names that they have in a folder."""
    tensors: dict[str, Tensor] = {f"{WEIGHT}{name}": t for name, t in checkpoint["state_dict"].items()}
    for index, states in enumerate(checkpoint.get("optimizer_states", ())):
        for number, entries in states["state"].items():
            tensors |= {optimizer_name(index, number, entry): t for entry, t in entries.items()}
    return tensors


def join_slices(checkpoint: dict[str, Any]) -> None:
    """Read whole tensors for those on the meta device that `describe_tensors` put into a checkpoint.

    Raises:
        ValueError: if the folder is broken.
    """
    folder = checkpoint.pop(SLICES)
    tensors = {name: torch.empty_like(t, device="cpu") for name, t in named_tensors(checkpoint).items()}
    fill_from_slices(folder, tensors)
    for name in checkpoint["state_dict"]:
        checkpoint["state_dict"][name] = tensors[f"{WEIGHT}{name}"]
    for index, states in enumerate(checkpoint.get("optimizer_states", ())):
        for number, entries in states["state"].items():
            for entry in entries:
                entries[entry] = tensors[optimizer_name(index, number, entry)]


def _meta(about: Any) -> Tensor:
    if not isinstance(about, TensorStorageMetadata):
        raise pickle.UnpicklingError("it holds more than tensors")
    return torch.empty(about.size, dtype=about.properties.dtype, device="meta")


def _error(folder: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ValueError(
        f"the slices in {folder} can't be read ({reason}); a checkpoint's file and its folder belong together"
    )
