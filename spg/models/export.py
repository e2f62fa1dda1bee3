"""A run's model as a folder: config.json, sharded safetensors, tokenizer and card; or a PEFT folder.

The layout is the published models' own, tensor by tensor, so that whatever reads these reads an export.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from spg import __version__
from spg.config import build, shipped
from spg.core.errors import InputError, RunError
from spg.core.files import DISK_FULL, write_text
from spg.models.factory import base_name, build_policy
from spg.models.hub import CONFIG, config_fields, fetch
from spg.models.lora import TENSORS, Merged, add_adapter, load_adapter, merged, name_base, save_adapter
from spg.models.network import Network
from spg.models.weights import INDEX, SINGLE, load_checkpoint, load_weights
from spg.runs.provenance import git_commit
from spg.runs.status import read_status, write_json

log = logging.getLogger(__name__)


# by which word summary.json has the figures of a run's files
MOMENTS = {"best.ckpt": "after", "last.ckpt": "last", "weights.safetensors": "last", "adapter": "last"}


def export(cfg: DictConfig, trained: DictConfig, source: Path, output: Path) -> None:
    """Write the weights `source` of the run configured as `trained` to `output`, whole or not at all.

    Raises InputError where the folder can't be made, RunError where `source` does not fit the run's model,
    and where the disk takes no more.
    """
    dtype = None if cfg.cast == "keep" else getattr(torch, cfg.cast)
    staged = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"output={output} can't be made ({error}); give a folder that can be") from error
    try:
        if cfg.merge or trained.model.lora is None:
            _write_model(trained, source, staged, dtype, cfg.shard_mb * 10**6)
        else:
            _write_adapter(trained, source, staged, dtype)
        write_text(staged / "training.yaml", OmegaConf.to_yaml(trained, resolve=True))
        write_text(staged / "README.md", card(cfg, trained, source, output))
        for path in staged.glob("*.safetensors"):  # which are made for their owner alone
            shutil.copymode(staged / "README.md", path)
        os.replace(staged, output)
    except SafetensorError as error:
        raise RunError(
            f"{output} can't be written ({error}); make room, or give another output=..."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    log.info("Written: %s (%s)", output, ", ".join(sorted(path.name for path in output.iterdir())))
    for line in how_to_load(cfg, trained, output):
        log.info("  %s", line)


def _write_model(
    trained: DictConfig, source: Path, folder: Path, dtype: torch.dtype | None, most: int
) -> None:
    """Write weights, configuration and tokenizer."""
    if trained.model.lora is None:  # every weight comes from `source`, and the base need not be read
        network: Network = build(trained.model.network, seed=None)
        tokenizer: PreTrainedTokenizerBase = build(trained.model.tokenizer)
        _fill(network, source, None)
    else:
        policy = build_policy(_to_merge(trained))
        network, tokenizer = policy.network, policy.tokenizer
        _fill(network, source, policy.load_adapter)
    kind = write_weights(merged(network), folder, dtype, most)
    write_json(folder / "config.json", fields(network, tokenizer, trained, kind))
    tokenizer.save_pretrained(str(folder))


def _write_adapter(trained: DictConfig, source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a PEFT folder; of the base, which may be large or of 4 bits, the shapes are enough."""
    with torch.device("meta"):
        network: Network = build(trained.model.network, seed=None)
        name_base(network, base_name(trained))
        adapter = add_adapter(network, build(trained.model.lora))
    for module in network.modules():
        for part in ("lora_A", "lora_B"):
            if hasattr(module, part):
                getattr(module, part).to_empty(device="cpu")
    _fill(network, source, lambda path: load_adapter(adapter, path))
    save_adapter(adapter, folder)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / TENSORS).items()}
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _to_merge(trained: DictConfig) -> DictConfig:
    """Return the configuration of the model on the CPU, whose weights are whole."""
    cfg = trained.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.trainer.accelerator = "cpu"
    cfg.model.quantization = None
    return cfg


def _fill(network: Network, path: Path, load: Callable[[Path], None] | None) -> None:
    """Fill a network from a run's file, or by `load` from an adapter's folder."""
    try:
        if path.suffix == ".ckpt":
            load_checkpoint(network, path)
        elif path.suffix == ".safetensors":
            load_weights(network, path)
        elif load is None:
            raise ValueError(
                f"{path} holds an adapter, but the run has trained all weights; give its own file"
            )
        else:
            load(path)
    except ValueError as error:
        raise RunError(str(error)) from error


def write_weights(
    tensors: Mapping[str, Merged], folder: Path, dtype: torch.dtype | None, most: int
) -> torch.dtype:
    """Write tensors to files of at most `most` bytes and an index; return the dtype that most of them have.

    dtype: of what is written; None: each one's own. A single file needs no index.
    """
    kinds = {name: dtype or tensor.own.dtype for name, tensor in tensors.items()}
    sizes = {name: tensor.own.numel() * kinds[name].itemsize for name, tensor in tensors.items()}
    shards = shared_out(sizes, most)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names if len(shards) > 1 else [SINGLE], shards, strict=True):
        values = {name: tensors[name].value(kinds[name]) for name in shard}  # one file's at a time
        save_file(values, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    return Counter(kinds.values()).most_common(1)[0][0]


def shared_out(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Return the names in their order, in lists whose sizes are at most `most` bytes, or of one name."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def fields(
    network: Network, tokenizer: PreTrainedTokenizerBase, trained: DictConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what config.json holds: the base model's fields, the network's own, and the special tokens."""
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    kind = {"torch_dtype": str(dtype).removeprefix("torch.")}
    own = network.published_config()
    if trained.model.weights == "published":  # then it has been checked to say the same, and may say more
        base = _fields_of_base(trained)
        own |= {name: value for name, value in base.items() if value is not None or name not in own}
    return own | ids | kind


def _fields_of_base(trained: DictConfig) -> dict[str, Any]:
    """Return the fields of the base model's config.json that describe it anywhere; {} without one."""
    path = trained.model.get("path")
    if path is None:
        return {}
    found = config_fields(fetch(path, trained.model.revision, [CONFIG]))
    for name in ("_name_or_path", "quantization_config", "transformers_version", "dtype"):
        found.pop(name, None)
    # code in a folder is not copied; what names a repository's is still right
    hub = "" if Path(path).is_dir() else f"{path}--"
    code = {key: str(value) for key, value in found.pop("auto_map", {}).items()}
    code = {
        key: value if "--" in value else hub + value for key, value in code.items() if hub or "--" in value
    }
    return found | ({"auto_map": code} if code else {})


def how_to_load(cfg: DictConfig, trained: DictConfig, folder: Path) -> list[str]:
    """Return commands that load the folder, to be used with a task."""
    option = shipped("model", trained.model)
    model = "model=..." if option is None else f"model={option[0]}"
    if not (cfg.merge or trained.model.lora is None):
        base = trained.model.get("path")
        model += f" model.path={base}" if base is not None and option and option[1].path != base else ""
        return [f"python -m spg.evaluate {model} adapter={folder}"]
    key = "weights" if trained.model.get("path") is None else "path"
    return [f"python -m spg.evaluate {model} model.{key}={folder}"]


def card(cfg: DictConfig, trained: DictConfig, source: Path, output: Path) -> str:
    """Return a model card: what the weights are, the commands, the figures, how to load them."""
    whole = cfg.merge or trained.model.lora is None
    base = base_name(trained)
    run, file = Path(cfg.run).resolve(), source.resolve()
    where = file.relative_to(run) if file.is_relative_to(run) else source
    head: dict[str, Any] = {"tags": ["masked-diffusion", "reinforcement-learning"]}
    if base is not None and trained.model.weights == "published" and not Path(base).is_absolute():
        head["base_model"] = base  # a hub id: folders are absolute, be they still there or not
    if not whole:
        head["library_name"] = "peft"
    task = trained.task._target_.rpartition(".")[2]
    lora = trained.model.lora
    how = "all weights trained"
    if lora is not None:
        numbers = f"a low-rank adapter (rank {lora.r}, alpha {lora.alpha:g}, {lora.targets} matrices)"
        how = f"{numbers}, merged into the weights" if whole else f"{numbers}, here without the base"
    if whole and trained.model.get("quantization") is not None:
        how += "; it was trained on a 4-bit base, and merged into the base as published"
    arguments = read_status(Path(cfg.run)).get("arguments")
    lines = [
        f"- Base model: {'random weights' if base is None else f'`{base}`'}",
        f"- Trained by: `{shlex.join(['python', '-m', 'spg.train', *arguments])}`" if arguments else None,
        f"- Made by: `{shlex.join(['python', '-m', 'spg.export', *sys.argv[1:]])}`",
        f"- Weights: `{where}`, {'as trained' if cfg.cast == 'keep' else f'written as {cfg.cast}'}",
        f"- All settings of the run: `training.yaml`; spg {__version__}, commit {git_commit() or 'unknown'}",
        "- Licence: that of the base model holds for what was trained from it",
    ]
    facts = "\n".join(line for line in lines if line is not None)
    loading = "\n".join(how_to_load(cfg, trained, output))
    front = yaml.safe_dump(head, sort_keys=True).strip()
    return f"""---
{front}
---

# {run.name}

A masked diffusion language model, trained by reinforcement learning (SPG) on {task}: {how}.

{facts}

{figures(Path(cfg.run), source)}

To evaluate it, with `task=...`:

```
{loading}
```
"""


def figures(run: Path, source: Path) -> str:
    """Return in Markdown what the run measured before training and with the weights `source`."""
    moment = MOMENTS.get(source.name) if source.resolve().is_relative_to(run.resolve()) else None
    path = run / "summary.json"
    if moment is None or not path.is_file() or read_status(run).get("state") != "finished":
        return "No figures: the run is not finished, or these are neither its best weights nor its last."
    summary = json.loads(path.read_text(encoding="utf-8"))
    names = [key.removesuffix(".before.interval") for key in summary if key.endswith(".before.interval")]

    def cell(key: str) -> str:
        low, high = summary[f"{key}.interval"]
        return f"{summary[key]:.3f} ({low:.3f} to {high:.3f})"

    # runs before version 0.6 have bootstrap intervals, and do not name the method
    methods = {summary.get(f"{name}.{moment}.interval_method", "bootstrap") for name in names}
    rows = [
        f"| {name.replace('_', ' ')} | {cell(f'{name}.before')} | {cell(f'{name}.{moment}')} |"
        for name in names
    ]
    return "\n".join(
        [
            f"Greedy decoding of the test half, n = {summary['n']}, with 95% intervals "
            f"({', '.join(sorted(methods))}):",
            "",
            "| measure | before | after |",
            "| --- | --- | --- |",
            *rows,
        ]
    )
