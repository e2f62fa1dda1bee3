"""`python -m spg.export run=<run dir> merge=true`: a run's model as a folder that others load."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.cli import base_weights, launch
from spg.config import ConfigError
from spg.core.console import take_over_logging
from spg.core.files import write_text
from spg.runs.directory import read_updated_config

log = logging.getLogger(__name__)

# what a run's directory has for each word, the first that is there
PLACES = {
    "best": ("checkpoints/best.ckpt",),
    "last": ("checkpoints/last.ckpt", "weights.safetensors", "adapter"),
}


def job(cfg: DictConfig) -> None:
    """Write the folder and say how to load it.

    Raises:
        ConfigError: before the model is built, if there is nothing to export, or no place for it.
    """
    config.check(cfg)
    trained = read_updated_config(cfg.run)
    whole = cfg.merge or trained.model.lora is None
    source = checkpoint(Path(cfg.run), cfg.checkpoint)
    output = destination(cfg, whole)
    quantization = trained.model.get("quantization")
    if whole and quantization is not None and not cfg.unquantized:
        raise ConfigError(
            f"run={cfg.run} was trained on a base of 4-bit weights (model.quantization={quantization}), "
            "which can't be written in the published layout; give merge=false for the adapter alone, or "
            "unquantized=true to merge it into the base as published, another than it was trained on"
        )
    log.info("From: %s", source)
    export(cfg, trained, source, output)


def export(cfg: DictConfig, trained: DictConfig, source: Path, output: Path) -> None:
    """Write the trained weights of a run to a new folder, whole or not at all.

    Args:
        cfg: Configuration of the export.
        trained: Configuration of the run.
        source: The weights, from the run's directory or elsewhere.
        output: The folder to make.

    Raises:
        InputError: if the folder can't be made.
        RunError: if `source` does not fit the run's model, or the disk takes no more.
    """
    import torch

    from spg.models.export import new_folder, write_adapter, write_model
    from spg.models.factory import base_name
    from spg.reports.model_card import TrainedCard

    take_over_logging()
    dtype = None if cfg.cast == "keep" else getattr(torch, cfg.cast)
    whole = cfg.merge or trained.model.lora is None
    card = TrainedCard(Path(cfg.run), trained, base_name(trained), source, output, whole, cfg.cast)
    with new_folder(output) as folder:
        if whole:
            network, tokenizer = trained_network(trained, source)
            write_model(network, tokenizer, trained.model, folder, dtype, int(cfg.shard_mb * 10**6))
        else:
            write_adapter(trained_adapter(trained, source), folder, dtype)
        write_text(folder / "training.yaml", OmegaConf.to_yaml(trained, resolve=True))
        write_text(folder / "README.md", card.text())
        for path in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner alone
            shutil.copymode(folder / "README.md", path)
    log.info("Written: %s (%s)", output, ", ".join(sorted(path.name for path in output.iterdir())))
    for line in card.loading_commands():
        log.info("  %s", line)


def trained_network(trained: DictConfig, source: Path) -> tuple[Any, Any]:
    """Return network and tokenizer of a run with the weights `source`, on the CPU and not quantized."""
    from spg.models.factory import build_policy
    from spg.models.weights import load_trained

    if trained.model.lora is None:  # every weight comes from `source`: the base weights are not needed
        network = config.build(trained.model.network, seed=None)
        load_trained(network, source, None)
        return network, config.build(trained.model.tokenizer)
    cfg = trained.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.trainer.accelerator = "cpu"
    cfg.model.quantization = None
    policy = build_policy(cfg, base_weights.ensure)
    load_trained(policy.network, source, policy.load_adapter)
    return policy.network, policy.tokenizer


def trained_adapter(trained: DictConfig, source: Path) -> Any:
    """Return the adapter of a run with the weights `source`; of its base, only the shapes are built."""
    from spg.models.factory import build_adapter
    from spg.models.lora import load_adapter
    from spg.models.weights import load_trained

    network, adapter = build_adapter(trained)
    load_trained(network, source, lambda path: load_adapter(adapter, path))
    return adapter


def checkpoint(run: Path, which: str) -> Path:
    """Return the weights that `checkpoint=which` names; raise ConfigError if they are missing."""
    if which not in PLACES:
        path = Path(which)
        if path.suffix in (".ckpt", ".safetensors") and path.is_file():
            return path
        if (path / "adapter_config.json").is_file():
            return path
        raise ConfigError(
            f"checkpoint={which} is neither {' nor '.join(PLACES)}, nor a .ckpt or .safetensors file, nor a "
            "PEFT folder; give one of these"
        )
    for name in PLACES[which]:
        if (run / name).exists():
            return run / name
    others = [word for word in PLACES if any((run / name).exists() for name in PLACES[word])]
    remedy = f"give checkpoint={others[0]}" if others else "train it first, at least to its first checkpoint"
    raise ConfigError(f"run={run} has no {' nor '.join(PLACES[which])} yet; {remedy}")


def destination(cfg: DictConfig, whole: bool) -> Path:
    """Return the folder to make; raise ConfigError if it exists already."""
    name = "export" if whole else "export-adapter"
    output = Path(cfg.run) / name if cfg.output is None else Path(cfg.output)
    if output.exists():
        raise ConfigError(f"output={output} is there already; remove it, or give another")
    return output


def main() -> None:
    """Run the command."""
    launch.run("export", job)
