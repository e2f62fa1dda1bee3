"""A plan as a table that a stranger understands, and as a JSON file."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from spg.core.console import console
from spg.core.files import write_json
from spg.planning.hardware import GIB, Assumptions
from spg.planning.plan import Plan

log = logging.getLogger(__name__)


def show_plan(plan: Plan, cfg: DictConfig, assumptions: Assumptions) -> None:
    """Print a plan.

    Args:
        plan: What a run takes.
        cfg: Its configuration.
        assumptions: What is assumed.
    """
    hardware = plan.hardware
    each = f"{plan.processes} x " if plan.processes > 1 else ""
    log.info("Plan for %s%s, an estimate: nothing has run on it", each, hardware.name)
    log.info("")
    held = plan.held
    always = [
        ("weights", held.weights),
        ("its slice of the trained weights", held.slices),
        ("optimizer", held.optimizer),
        ("gradients", held.gradients),
        ("gradients on their way to other processes", held.exchange),
        ("copy of the model before training", held.reference),
    ]
    words = ", ".join(f"{name} {_size(size)}" for name, size in always if size)
    log.info("Each process always holds: %s", words)
    table = Table()
    for name in ("part", "memory", "share", "TFLOP", "moved", "time", "times"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    for phase in plan.phases:
        table.add_row(
            phase.name,
            _size(phase.bytes),
            f"{phase.bytes / hardware.memory:.0%}",
            f"{phase.work.operations / 1e12:,.{1 if phase.work.operations < 1e15 else 0}f}",
            _size(phase.work.moved),
            duration(phase.seconds),
            str(phase.times),
        )
    console.print(table)
    log.info("share: of the device's memory; moved: read and written; time: of one; times: in the whole run")
    verdict = "It fits" if plan.fits else "It does NOT fit"
    log.info("%s: %s of %s.", verdict, _size(plan.peak), _size(hardware.memory))
    log.info("Estimated time of the run: %s (%d updates).", duration(plan.seconds), cfg.trainer.max_updates)
    for recomputed, size in plan.largest_micro_batch.items():
        log.info("Largest trainer.micro_batch_size %s: %s", _with(recomputed), _largest(plan, size))
    for sentence in plan.advice:
        log.info("- %s", sentence)
    log.info("")
    for line in _assumed(plan, cfg, assumptions):
        log.info("%s", line)


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a JSON file, whole or not at all."""
    write_json(path, plan.record())


def _assumed(plan: Plan, cfg: DictConfig, assumptions: Assumptions) -> list[str]:
    source = "measured on the task" if plan.measured else "assumed; give prompt_tokens=<number>"
    lines = [
        f"Prompts of {plan.prompt_tokens} tokens ({source}); every completion has all {cfg.gen_length} "
        f"tokens, and all {plan.sequences} of a process are learned from.",
        f"Rates: {assumptions.products:.0%} of the published products and {assumptions.bandwidth:.0%} of the "
        f"bandwidth, {assumptions.launch_us:g} us for each operation; memory: "
        f"{assumptions.context_gib:g} GiB of libraries, {assumptions.fragments:.0%} lost between tensors "
        "(assumptions.*).",
        "Not in the time: rewards, starting up, reading and writing files.",
    ]
    if cfg.decoding.get("threshold") is not None or cfg.decoding.get("factor") is not None:
        lines.append(
            "Decoding by confidence is taken to commit few tokens in a step; real models commit more."
        )
    if cfg.model.get("compile"):
        lines.append(
            "model.compile is not taken into account: it lowers the time, and compiles at the start."
        )
    return lines


def _with(recomputed: bool) -> str:
    return f"with model.checkpointing={str(recomputed).lower()}"


def _largest(plan: Plan, size: int) -> str:
    if size == 0:
        return "none fits"
    return f"null (all {size} at once)" if size >= plan.masked else str(size)


def _size(count: float) -> str:
    if count >= 1024 * GIB:
        return f"{count / GIB / 1024:.1f} TiB"
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
