"""Weights in safetensors files, written whole or not at all, and read tensor by tensor."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spg.core.errors import RunError
from spg.models.network import Network

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# number of tensors that a message names; the others are counted
NAMED = 3


def save_weights(network: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the tensors of a network and metadata to `path`, under a temporary name first."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # a tensor with several names is written under the first
            seen.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous()
    save_tensors(tensors, path, metadata)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors [...] that share no memory, and metadata, to `path`, under a temporary name first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(dict(tensors), staged, metadata=dict(metadata))
    os.replace(staged, path)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a network from `path`; raise ValueError if the file is missing, broken or of another network."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is not a file but a folder; give its safetensors file")
    found = list_tensors(path)
    groups = _match_names(network, found, path)
    own = network.state_dict()
    with torch.no_grad(), safe_open(path, framework="pt") as file:
        for names in groups:
            own[names[0]].copy_(file.get_tensor(_stored_name(names, found)))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: The file.
        shape: Sizes of the tensor.
    """

    file: Path
    shape: tuple[int, ...]


def list_tensors(place: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a file or a published folder by name, without reading them.

    Raises:
        ValueError: if there are none, if a file is missing or broken, or if the index does not agree with
            the files.
    """
    listed: dict[str, list[str]] | None = None
    if not place.is_dir():
        if not place.is_file():
            raise ValueError(f"{place} is not a file; give safetensors weights, or model.weights=base")
        files = [place]
    elif (place / INDEX).is_file():
        listed = _read_index(place / INDEX)
        files = [place / name for name in listed]
    elif (place / SINGLE).is_file():
        files = [place / SINGLE]
    else:
        raise ValueError(
            f"{place} has neither {SINGLE} nor {INDEX}; give a folder with safetensors weights: model.path"
        )
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"{place}: {INDEX} names {_describe(missing, len(files))} files that are not there; get the "
            "files of the folder again, all of them"
        )
    found: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                # this is a file, not a dictionary
                own = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a safetensors file, or not a whole one ({error}); get it, or make it, again"
            ) from error
        if listed is not None and (wrong := sorted(set(listed[path.name]) ^ own.keys())):
            kind = "is not in it" if wrong[0] not in own else "is in it unnamed"
            raise ValueError(
                f"{path} is not the file that {INDEX} describes: {len(wrong)} tensors differ, first "
                f"{wrong[0]}, which {kind}; get the folder's files again, all of one revision"
            )
        found |= {name: StoredTensor(path, shape) for name, shape in own.items()}
    return found


def _read_index(index: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each file of an index."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not places:
            raise TypeError("weight_map is not a list of tensors and files")
        files: dict[str, list[str]] = {}
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise TypeError(f"{name} is in {file!r}, which is not a file of the folder")
            files.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} can't be read ({error!r}); get it again") from error
    return files


def load_published(
    network: Network,
    place: Path,
    dtype: torch.dtype,
    device: torch.device,
    convert: Callable[[str, Tensor], nn.Parameter | None] | None = None,
) -> int:
    """Load a network that was built on the meta device from a folder or a file.

    Each tensor becomes a parameter on `device` before the next one is read, so that the host needs little
    memory beyond the weights. A parameter with several names stays one; one name in the files is enough.

    Args:
        network: The network without storage.
        place: A published folder, or a safetensors file.
        dtype: Type of the parameters.
        device: Device of the parameters.
        convert: Makes a parameter from its name and tensor [...], or returns None to leave that to this one.

    Returns:
        The number of files that were read.

    Raises:
        ValueError: before a tensor is read, if tensors are missing, have another shape or are too many.
    """
    found = list_tensors(place)
    by_file: dict[Path, list[tuple[str, ...]]] = {}
    for names in _match_names(network, found, place):
        by_file.setdefault(found[_stored_name(names, found)].file, []).append(names)
    for path, groups in by_file.items():
        with safe_open(path, framework="pt") as file:
            for names in groups:
                given = _stored_name(names, found)
                tensor = file.get_tensor(given)
                _check_equal(
                    tensor, given, [name for name in names if name in found and name != given], found
                )
                _assign(network, given, names, tensor, dtype, device, convert)
    return len(by_file)


def _stored_name(names: Sequence[str], found: Mapping[str, StoredTensor]) -> str:
    """Return the first of the names of a tensor that a file has."""
    return next(name for name in names if name in found)


def _check_equal(
    tensor: Tensor, given: str, others: Sequence[str], found: Mapping[str, StoredTensor]
) -> None:
    """Raise ValueError if a tensor of the network is stored under `others`, too, with other values."""
    for name in others:
        with safe_open(found[name].file, framework="pt") as file:
            if not torch.equal(tensor, file.get_tensor(name)):
                raise ValueError(
                    f"{found[name].file}: {name} differs from {given}, but both are one tensor in this "
                    "model; give model.network.config.tie_word_embeddings=false"
                )


def _match_names(network: nn.Module, found: Mapping[str, StoredTensor], place: Path) -> list[tuple[str, ...]]:
    """Return the names of each tensor of the network; raise ValueError if the files have other tensors."""
    tensors: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    tensors |= {
        name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if name not in tensors
    }
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    missing = [names[0] for names in groups.values() if not found.keys() & set(names)]
    extra = [name for name in found if name not in tensors]
    shaped = [
        f"{name} is {found[name].shape} in {found[name].file.name} and {tuple(tensor.shape)} in the model"
        for name, tensor in tensors.items()
        if name in found and found[name].shape != tuple(tensor.shape)
    ]
    complaints = []
    if missing:
        shapes = [f"{name} {tuple(tensors[name].shape)}" for name in sorted(missing)]
        complaints.append(f"{_describe(shapes, len(groups))} of the model's tensors are missing")
    if shaped:
        complaints.append(f"{_describe(shaped, len(groups))} tensors are of another shape")
    if extra:
        there = [f"{name} {found[name].shape} in {found[name].file.name}" for name in sorted(extra)]
        complaints.append(f"{_describe(there, len(found))} of its tensors are not in the model")
    if complaints:
        raise ValueError(
            f"{place} does not fit this model: {'; '.join(complaints)}; give the model that it belongs to "
            "(model=..., or its sizes under model.network.config), or other weights"
        )
    return [tuple(names) for names in groups.values()]


def _describe(names: Sequence[str], total: int) -> str:
    """Return the number of names, the first few of them, and the total."""
    rest = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} ({', '.join(names[:NAMED])}{rest}) of {total}"


def _assign(
    network: nn.Module,
    given: str,
    names: Sequence[str],
    tensor: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    convert: Callable[[str, Tensor], nn.Parameter | None] | None,
) -> None:
    """Make a tensor of a file a parameter of the network, under all its names."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(
            f"{given} is {str(tensor.dtype).removeprefix('torch.')}: weights that others have quantized "
            "can't be read; give a folder with float32, bfloat16 or float16 weights "
            "(and model.quantization=nf4)"
        )
    own: Tensor | None = None if convert is None else convert(names[0], tensor)
    if own is None:
        # a copy: the tensor is a view of the file, and would change and disappear with it
        own = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        if leaf in module._parameters and not isinstance(own, nn.Parameter):
            own = nn.Parameter(own)
        setattr(module, leaf, own)


def load_checkpoint(network: nn.Module, path: str | Path) -> None:
    """Load the trained tensors of a network from a training checkpoint.

    Raises:
        ValueError: if the file is broken, or its tensors are not those that the network trains.
    """
    prefix = "policy.network."
    checkpoint = describe_checkpoint(path)
    found = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items()}
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    wrong = sorted(n for n in own.keys() | found.keys() if n not in own or n not in found)
    wrong += [n for n in own if n in found and own[n].shape != found[n].shape]
    if wrong:
        raise ValueError(f"{path} does not fit this model: {len(wrong)} tensors differ, first {wrong[0]}")
    fill_weights(checkpoint, {f"{prefix}{name}": parameter.detach() for name, parameter in own.items()})


def fill_weights(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Fill weights [...], whole or sliced over processes, from what `describe_checkpoint` returned.

    Raises:
        ValueError: if the checkpoint is broken.
    """
    if "slices" in checkpoint:
        from spg.models.slices import WEIGHT, fill_from_slices  # few checkpoints are in slices

        fill_from_slices(checkpoint["slices"], {f"{WEIGHT}{name}": w for name, w in weights.items()})
    else:
        for name, weight in weights.items():
            weight.copy_(checkpoint["state_dict"][name])


def load_trained(network: nn.Module, path: Path, load_adapter: Callable[[Path], None] | None) -> None:
    """Fill a network with what a run has trained.

    Args:
        network: The run's network.
        path: A checkpoint (.ckpt), a file of weights (.safetensors), or the PEFT folder of an adapter.
        load_adapter: Loads an adapter from its folder; None if the network has no adapter.

    Raises:
        RunError: if the file or folder does not fit the network.
    """
    try:
        if path.suffix == ".ckpt":
            load_checkpoint(network, path)
        elif path.suffix == ".safetensors":
            load_weights(network, path)
        elif load_adapter is None:
            raise ValueError(
                f"{path} holds an adapter, but the run has trained all weights; give its own file"
            )
        else:
            load_adapter(path)
    except ValueError as error:
        raise RunError(str(error)) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a training checkpoint with whole tensors on the CPU, whether its file holds them or slices.

    Raises:
        ValueError: if the file is missing or broken, or no checkpoint of this project.
    """
    checkpoint = describe_checkpoint(path)
    if "slices" in checkpoint:
        from spg.models.slices import join_slices

        join_slices(checkpoint)
    return checkpoint


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a training checkpoint without reading its tensors.

    Tensors of a whole file are read page by page as they are used, by all processes of a run. Those in slices
    have shape and type only (device "meta"); `slices` is the path of their folder then.

    Raises:
        ValueError: if the file is missing or broken, or no checkpoint of this project.
    """
    path = Path(path)
    checkpoint = read_file(path)
    if "slices" in checkpoint:
        from spg.models.slices import describe_tensors

        describe_tensors(checkpoint, path.parent / Path(str(checkpoint["slices"])).name)
    return checkpoint


def read_file(path: Path) -> dict[str, Any]:
    """Return what the file of a checkpoint holds; if its tensors are in slices, none, and the folder's name.

    Raises:
        ValueError: if the file is missing or broken, or no checkpoint of this project.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a checkpoint that spg.train wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or "spg" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of spg.train")
    return checkpoint
