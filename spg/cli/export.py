"""`python -m spg.export run=<run dir> merge=true`: a run's model as a folder that others load."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from spg import config
from spg.cli import launch
from spg.config import ConfigError
from spg.runs import directory as runs

log = logging.getLogger(__name__)

# what a run's directory has for each word, the first that is there
PLACES = {
    "best": ("checkpoints/best.ckpt",),
    "last": ("checkpoints/last.ckpt", "weights.safetensors", "adapter"),
}


def job(cfg: DictConfig) -> None:
    """Write the folder and say how it is loaded; raises ConfigError before the model is built."""
    config.check(cfg)
    trained = runs.read_updated_config(cfg.run)
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
    from spg.core.console import take_over_logging
    from spg.models.export import export

    take_over_logging()
    log.info("From: %s", source)
    export(cfg, trained, source, output)


def checkpoint(run: Path, which: str) -> Path:
    """Return the weights that `checkpoint=which` names; raises ConfigError where they are not there."""
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
    """Return the folder to make; raises ConfigError where there is something already."""
    name = "export" if whole else "export-adapter"
    output = Path(cfg.run) / name if cfg.output is None else Path(cfg.output)
    if output.exists():
        raise ConfigError(f"output={output} is there already; remove it, or give another")
    return output


def main() -> None:
    """Run the command."""
    launch.run("export", job)
