"""Evaluation of saved models: a table, and evaluation.json beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.table import Table

from spg.collect import evaluate
from spg.config import ConfigError, build
from spg.console import console, take_over_logging
from spg.decoding import Decoder
from spg.policy import Policy
from spg.pretraining import build_policy
from spg.tasks.base import Task
from spg.weights import load_checkpoint, load_weights

log = logging.getLogger(__name__)


def evaluate_models(cfg: DictConfig, folder: Path) -> dict[str, dict[str, float]]:
    """Evaluate the base model and, with `run`, the run's checkpoints and final weights.

    Returns and writes to `<folder>/evaluation.json`: {model: {measure: mean}} with 95% intervals,
    n, split and decoding beside them.
    """
    take_over_logging()
    torch.set_num_threads(cfg.threads)
    task: Task = build(cfg.task)
    decoder: Decoder = build(cfg.decoding, temperature=cfg.temperature)
    policy = build_policy(cfg)
    if cfg.accelerator == "cuda" or (cfg.accelerator == "auto" and torch.cuda.is_available()):
        policy.to("cuda")
    examples = task.examples(cfg.split)
    table = Table(title=f"{task.name}, split {cfg.split}, n = {len(examples)} (95% bootstrap interval)")
    table.add_column("model", no_wrap=True)
    results: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for name in models(cfg, policy):
        result = evaluate(policy, decoder, task, examples, cfg.eval_batch_size, cfg.seed)
        if not results:
            for measure in result.measures:
                table.add_column(measure.replace("_", " "), justify="right")
        results[name] = {measure: result.mean(measure) for measure in result.measures}
        intervals[name] = {measure: result.interval(measure) for measure in result.measures}
        cells = []
        for measure, mean in results[name].items():
            low, high = intervals[name][measure]
            cells.append(f"{mean:.3f}\n({low:.3f} to {high:.3f})")
        table.add_row(name, *cells)
    console.print(table)
    path = folder / "evaluation.json"
    record = {
        "results": results,
        "intervals": intervals,
        "n": len(examples),
        "split": cfg.split,
        "run": cfg.run,
        "gen_length": decoder.gen_length,
        "steps": decoder.steps,
        "block_size": decoder.block_size,
        "temperature": decoder.temperature,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    log.info("Written: %s", path)
    return results


def models(cfg: DictConfig, policy: Policy) -> Iterator[str]:
    """Fill `policy` with one model after the other, and yield the name of each.

    Raises ConfigError where a run has no weights yet.
    """
    yield "base" if cfg.model.weights == "base" else str(cfg.model.weights)
    if cfg.run is None:
        return
    found = False
    for path in sorted(Path(cfg.run, "checkpoints").glob("*.ckpt")):
        load_checkpoint(policy.network, path)
        found = True
        yield f"checkpoints/{path.name}"
    final = Path(cfg.run, "weights.safetensors")
    adapter = Path(cfg.run, "adapter")
    if final.is_file():
        load_weights(policy.network, final)
        found = True
        yield final.name
    elif adapter.is_dir() and policy.has_adapter:
        policy.load_adapter(adapter)
        found = True
        yield adapter.name
    if not found:
        raise ConfigError(f"run={cfg.run} holds neither checkpoints nor weights.safetensors yet")
