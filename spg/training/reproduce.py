"""Computing again, from the file that a stopped run left, a value that was not finite."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from spg.algorithms.objectives import Adaptive
from spg.config import ConfigError, check, check_complete, update_paths
from spg.core.console import console
from spg.core.hub import one_line
from spg.core.types import Experience, MaskedSamples, Rollout, UpdateBatch
from spg.training.assembly import build_module
from spg.training.module import Training
from spg.training.nonfinite import find_culprits

log = logging.getLogger(__name__)


def reproduce(path: Path) -> bool:
    """Compute the rewards, or the loss and its gradient, of a stopped update, and show its sequences.

    Args:
        path: The file that the run left, nonfinite-update-<number>.pt.

    Returns:
        Whether something was not finite again.

    Raises:
        ConfigError: if the file is not one that a stopped run left.
    """
    record = read_record(path)
    what, update = record["what"], record["update"]
    cfg = OmegaConf.create(update_paths(record["config"]))
    assert isinstance(cfg, DictConfig)
    check_complete(cfg, path)
    check(cfg)
    torch.set_num_threads(cfg.trainer.threads)
    module = build_module(cfg)
    module.updates, module.rollouts = update - 1, record["rollout"]
    if isinstance(module.objective, Adaptive):
        module.objective.restore(record.get("objective", {}))
    try:
        unknown = module.policy.load_state_dict(record["weights"], strict=False).unexpected_keys
    except RuntimeError as error:  # other shapes
        raise ConfigError(f"{path} does not fit the model of its configuration: {one_line(error)}") from error
    if unknown:
        raise ConfigError(f"{path} does not fit the model of its configuration: {unknown[0]}; was it edited?")
    module.policy.train("old" not in module.objective.needs)  # as in the update
    log.info("%s of update %d, as the run computed it: not finite", what, update)
    table = Table(
        "completion", "reward", "advantage", "lowest log-prob.", title="Sequences, the bad ones marked *"
    )
    seen = False
    for part in record["parts"]:
        seen |= _compute(module, part, table)
    console.print(table)
    log.info("Not finite again: %s", "yes" if seen else "no")
    return seen


def read_record(path: Path) -> dict[str, Any]:
    """Return what a stopped run left at `path`. Nothing in the file is executed.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no file of torch raises errors of every kind
        raise ConfigError(
            f"{path} is not a file that a stopped run left, or not a whole one ({one_line(error)}); give the "
            "one that its error named"
        ) from error
    kinds = {"what": str, "update": int, "rollout": int, "config": dict, "weights": dict, "parts": list}
    wrong = [
        key
        for key, kind in kinds.items()
        if not isinstance(record, dict) or not isinstance(record.get(key), kind)
    ]
    if wrong:
        raise ConfigError(
            f"{path} is not a file that a stopped run left: it has no {', '.join(wrong)}; give the one that "
            "its error named"
        )
    return dict(record)


def _compute(module: Training, part: dict[str, Any], table: Table) -> bool:
    """Compute what one process had of the update and add its sequences to the table."""
    fields = dict(part["experience"])
    experience = Experience(**{**fields, "rollout": Rollout(**fields["rollout"])})
    rollout = experience.rollout
    batch, logps, loss = None, None, 0.0
    if part["samples"] is not None:
        batch = UpdateBatch.of(experience, MaskedSamples(**part["samples"]))
        # the file holds the log-probabilities of the old policy, which is gone
        batch = replace(module.gradient.freeze(batch, policy_changes=False), old=part.get("old"))
        logps = module.gradient.all_logps(batch).masked_fill(~batch.samples.scored, 0.0)
        with torch.no_grad():
            loss = float(module.objective(logps, batch).loss)
        log.info("loss %s", loss)
    bad = set() if batch is None else set(find_culprits(experience, batch, module.gradient))
    for row, text in enumerate(rollout.texts):
        again = sum(module.task.reward(rollout.examples[row], text).values())
        if batch is None and not math.isfinite(again):
            bad.add(row)
        lowest = "-" if logps is None else f"{float(logps[row].min()):.2f}"
        mark = "* " if row in bad else "  "
        shown = Text(mark + " / ".join(text.split("\n")))
        table.add_row(shown, f"{again:.3f}", f"{float(experience.advantages[row]):+.3f}", lowest)
    return bool(bad) or not math.isfinite(loss)
