"""What an evaluation's completions are made with: files, and whether they are still the same ones."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from spg.config import ConfigError
from spg.runs.provenance import file_stamp

# what tells how completions were decoded
DECODING = (
    "gen_length",
    "steps",
    "block_size",
    "temperature",
    "remasking",
    "stop_at_eos",
    "cache",
    "refresh_every",
)
# what model.weights may be beside a file or a folder
WORDS = ("base", "published", "random")
# the model before training, which no rule chooses
BASE = "base"


def saved_by(run: Path, select: str) -> list[tuple[str, Path]]:
    """Return name and path of the run's weights to evaluate, by the rule that will choose among them.

    validation: the best checkpoint and the final weights; test_average: every checkpoint. The last checkpoint
    stands for final weights that are not there yet. Raises ConfigError where there is nothing.
    """
    final = [path for path in (run / "weights.safetensors", run / "adapter") if path.exists()][:1]
    saved = sorted(run.glob("checkpoints/*.ckpt"))
    # what a run that went back has put aside is not its own any more
    saved = [path for path in saved if not path.name.startswith("replaced")]
    last = [path for path in saved if path.name == "last.ckpt"]
    if select == "validation":
        saved = [path for path in saved if path.name == "best.ckpt"] + (final or last)
    else:
        saved = saved if last else saved + final
    if not saved:
        raise ConfigError(f"run={run} holds neither checkpoints nor weights.safetensors yet")
    return [(str(path.relative_to(run)), path) for path in saved]


def fingerprints(cfg: DictConfig) -> dict[str, list[int]]:
    """Return what tells whether the files that an evaluation's completions come from are the same, by name.

    They are the saved generations, or a run's weights by `saved_by`, an adapter, and the initial weights
    where these are a file, or a folder here.
    """
    if cfg.generations is not None:
        return {"generations": file_stamp(Path(cfg.generations))}
    files = dict(saved_by(Path(cfg.run), cfg.select)) if cfg.run is not None else {}
    if cfg.model.weights not in WORDS and Path(cfg.model.weights).exists():
        files["weights"] = Path(cfg.model.weights)
    if cfg.get("adapter") is not None:
        files["adapter"] = Path(cfg.adapter)
    base = cfg.model.get("path")
    if cfg.model.weights == "published" and base is not None and Path(base).is_dir():
        files["model.path"] = Path(base)
    return {name: file_stamp(path) for name, path in files.items()}
