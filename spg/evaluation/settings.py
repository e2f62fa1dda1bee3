"""The settings of an evaluation: those of the command line, of a run and of an adapter's folder, merged."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.config import ConfigError
from spg.evaluation.selection import run_weights
from spg.models import hub
from spg.runs.directory import read_updated_config
from spg.runs.provenance import file_stamp

log = logging.getLogger(__name__)

# settings that an evaluation may go on with changed; they change rounding at most
CHANGEABLE = ("eval_batch_size", "threads")
# what results.json says of decoding
DECODING_SETTINGS = (
    "gen_length",
    "steps",
    "block_size",
    "temperature",
    "remasking",
    "stop_at_eos",
    "cache",
    "refresh_every",
    "threshold",
    "factor",
    "cfg_scale",
)
# what results.json says besides
RECORDED_SETTINGS = ("samples", "seed", "eval_batch_size", "threads", "run", "adapter", "generations")
# values of model.weights that are neither a file nor a folder
WEIGHT_WORDS = ("base", "published", "random")
# settings that say how completions are made, and mean nothing for completions that exist
COMPLETION_SETTINGS = (
    "run",
    "adapter",
    "select",
    "split",
    "samples",
    "model",
    "pretrain",
    "decoding",
    "block_size",
    "gen_length",
    "temperature",
    "seed",
    "accelerator",
)


def merge_settings(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the whole configuration of an evaluation, with a run's parts, split and parser in place.

    Args:
        cfg: The composed configuration of the command.
        overrides: The command line that it was composed from.

    Raises:
        ConfigError: if settings contradict each other.
    """
    config.check(cfg)
    given = _keys(overrides)
    _check_contradictions(cfg, given)
    merged = cfg.copy() if cfg.run is None else merge_run(cfg, overrides)
    if cfg.adapter is not None:
        OmegaConf.set_struct(merged, False)
        merged.model.lora = adapter_settings(Path(cfg.adapter))
        for key in (key for key in given if key == "model.lora" or key.startswith("model.lora.")):
            log.warning("%s is not read: the folder adapter=%s has its own numbers", key, cfg.adapter)
    if cfg.split == "auto" and cfg.generations is None:
        # a checkpoint that the validation half chose is tested on the other half
        by_validation = cfg.run is not None and cfg.select == "validation"
        merged.split = "test" if by_validation else "heldout"
    if cfg.parser is not None:
        if "parser" not in merged.task:
            raise ConfigError(f"parser={cfg.parser}: this task has one parser only; leave it out")
        merged.task.parser = cfg.parser
    for key in ("run", "adapter", "generations"):  # to go on from another directory as well
        if cfg[key] is not None:
            merged[key] = str(Path(cfg[key]).absolute())
    merged = hub.settle(merged)
    config.check(merged)
    config.check_model(merged)
    config.check_samples(merged)
    lengths = [] if cfg.generations is not None else config.decoding_notes(merged)
    for note in (*config.unread_steps(merged, overrides), *lengths):
        log.warning("%s", note)
    return merged


def merge_run(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return `cfg` with the model, task and decoding of the run `cfg.run`, unless they are overridden.

    With another task, that task's lengths and decoding hold. With another length, the number of tokens a
    decoding step stays that of the run.

    Raises:
        ConfigError: if the directory holds no run, or its task lacks a setting.
    """
    trained = read_updated_config(cfg.run)
    given = _keys(overrides)
    merged = cfg.copy()
    OmegaConf.set_struct(merged, False)
    merged.model = trained.model
    merged.pretrain = trained.pretrain
    parts = ["model"]
    if "task" not in given:
        parts += ["task", "decoding"]
        merged.task = trained.task
        for key in ("gen_length", "block_size"):
            merged[key] = cfg[key] if key in given else trained[key]
        kind = cfg if "decoding" in given else trained
        merged.decoding = _scale_decoding(kind, trained, merged.gen_length, merged.block_size)
    for key in given:
        part = key.partition(".")[0]
        if part not in parts or key == "decoding":
            continue
        if part == "task" and key.removeprefix("task.") not in trained.task:
            raise ConfigError(
                f"{key}: the run's task has no such setting; it has {', '.join(config.keys(trained.task))}"
            )
        OmegaConf.update(merged, key, OmegaConf.select(cfg, key))
    for key in ("path", "revision"):  # a run's configuration is resolved: its tokenizer follows here
        if f"model.{key}" in given and trained.model.tokenizer.get(key) == trained.model.get(key):
            merged.model.tokenizer[key] = merged.model[key]
    return merged


def adapter_settings(folder: Path) -> dict[str, str]:
    """Return the settings of the adapter in a PEFT folder.

    Raises:
        ConfigError: if the folder holds no adapter of kind LORA.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        inner = folder / "adapter"
        has_inner = (inner / path.name).is_file()
        remedy = f"adapter={inner}" if has_inner else "the folder adapter/ that a run with LoRA leaves"
        raise ConfigError(
            f"adapter={folder} is not a PEFT folder: it has no adapter_config.json; give {remedy}"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} can't be read ({error}); give another adapter=...") from error
    if kind != "LORA":
        raise ConfigError(f"{path}: an adapter of kind {kind} can't be evaluated; only LORA can")
    return {"_target_": "spg.models.lora.SavedLoRA", "folder": str(folder.absolute())}


def fingerprints(cfg: DictConfig) -> dict[str, list[int]]:
    """Return sizes and times of the files that an evaluation's completions come from, by name.

    The files are the saved generations, or a run's weights, an adapter, and the initial weights if these
    are a file or a local folder. If a figure changes, the completions would change too.
    """
    if cfg.generations is not None:
        return {"generations": file_stamp(Path(cfg.generations))}
    files = dict(run_weights(Path(cfg.run), cfg.select)) if cfg.run is not None else {}
    if cfg.model.weights not in WEIGHT_WORDS and Path(cfg.model.weights).exists():
        files["weights"] = Path(cfg.model.weights)
    if cfg.get("adapter") is not None:
        files["adapter"] = Path(cfg.adapter)
    base = cfg.model.get("path")
    if cfg.model.weights == "published" and base is not None and Path(base).is_dir():
        files["model.path"] = Path(base)
    return {name: file_stamp(path) for name, path in files.items()}


def _check_contradictions(cfg: DictConfig, given: Sequence[str]) -> None:
    """Raise ConfigError for settings that can't be given together, or belong to training."""
    for key in given if cfg.generations is not None else ():
        if key.partition(".")[0] in COMPLETION_SETTINGS:
            raise ConfigError(
                f"{key}={_value(cfg, key)} can't be given with generations=..., whose file says what was "
                "completed; leave one of the two out"
            )
    if "decoding.temperature" in given:
        raise ConfigError(
            f"decoding.temperature={cfg.decoding.temperature} is that of rollouts in training; an evaluation "
            f"has its own: temperature={cfg.decoding.temperature}"
        )
    if cfg.adapter is not None and cfg.run is not None:
        raise ConfigError(
            f"adapter={cfg.adapter} and run={cfg.run} can't be given together: a run's adapter is "
            "evaluated with it; leave one of the two out"
        )


def _keys(overrides: Sequence[str]) -> list[str]:
    """Return the dotted keys and the groups that a command line sets."""
    return [line.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".") for line in overrides]


def _value(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return "..." if OmegaConf.is_config(value) else value


def _scale_decoding(
    kind: DictConfig, trained: DictConfig, gen_length: int, block_size: int
) -> dict[str, Any]:
    """Return the decoding of the configuration `kind` for these sizes.

    A run's configuration is resolved: what followed its lengths there follows the new ones here.
    """
    decoding = OmegaConf.to_container(kind.decoding, resolve=True)
    assert isinstance(decoding, dict)
    if kind.decoding.block_size == kind.block_size:
        block = block_size
    elif kind.decoding.block_size == kind.gen_length:
        block = gen_length
    else:
        block = kind.decoding.block_size
    steps = -(-gen_length * trained.decoding.steps // trained.gen_length)
    return {str(k): v for k, v in decoding.items()} | {
        "gen_length": gen_length,
        "block_size": block,
        "steps": steps,
    }
