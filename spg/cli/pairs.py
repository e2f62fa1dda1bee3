"""`python -m spg.pairs task=sudoku output=pairs.jsonl`: preference pairs of a model's own completions."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spg import config
from spg.cli import base_weights, launch
from spg.config import ConfigError
from spg.core.console import console, take_over_logging
from spg.core.errors import InputError, Interrupted, RunError
from spg.models import hub

log = logging.getLogger(__name__)

# seconds between lines that tell the progress where standard output is no terminal
QUIET = 30.0


def job(cfg: DictConfig) -> None:
    """Make the file as configured; raises ConfigError before the model is built."""
    cfg = settings(cfg, list(HydraConfig.get().overrides.task))
    output = destination(cfg)
    make(cfg, output)


def settings(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the whole configuration; raises ConfigError where no pairs could come of it."""
    config.check(cfg)
    if cfg.samples < 2:
        raise ConfigError(f"samples={cfg.samples}: a pair is two completions of a prompt; give samples=8")
    if any(line.lstrip("+").startswith("decoding.temperature=") for line in overrides):
        raise ConfigError(
            f"decoding.temperature={cfg.decoding.temperature} is that of rollouts in training; pairs have "
            f"their own: temperature={cfg.decoding.temperature}"
        )
    own = hub.settle(cfg).copy()
    own.model.lora = None  # an adapter that was not trained changes nothing
    return own


def destination(cfg: DictConfig) -> Path:
    """Return the file to make, in a folder that is there; raises ConfigError where it can't be made."""
    output = Path(cfg.output)
    if output.exists():
        raise ConfigError(f"output={output} is there already; remove it, or give another")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output} can't be written ({error}); give another") from error
    return output


def make(cfg: DictConfig, output: Path) -> None:
    """Write the pairs to `output`, a line each as they are found, and say how many there are.

    Raises InputError where there are too few training examples, RunError where no prompt gives a pair.
    """
    import torch

    from spg.models.factory import build_policy, check_device, check_reads, device_of
    from spg.rollout.decoder import Decoder
    from spg.rollout.prompt_order import PromptStream
    from spg.rollout.recorded import make_pairs
    from spg.tasks.base import Task

    take_over_logging()
    check_device(cfg)
    torch.set_num_threads(cfg.threads)
    task: Task = config.build(cfg.task)
    available = task.examples("train")
    if cfg.prompts > len(available):
        raise InputError(
            f"prompts={cfg.prompts}, but {task.name} has {len(available)} training examples; give "
            f"prompts={len(available)} or fewer"
        )
    examples = PromptStream(available, cfg.prompts, 1, cfg.seed).examples(0)
    check_reads(cfg, task.prompt(examples[0]), task.name)
    decoder: Decoder = config.build(cfg.decoding, temperature=cfg.temperature)
    policy = build_policy(cfg, base_weights.ensure).to(device_of(cfg)).eval()
    batches = make_pairs(policy, decoder, task, examples, cfg.samples, cfg.eval_batch_size, cfg.seed)
    pairs: list[dict[str, Any]] = []
    done, file = 0, None
    try:
        with _Told(cfg.prompts) as told:
            for batch in batches:
                found = [pair for pair in batch if pair is not None]
                if found:
                    file = file or _new(output)
                    _add(file, found)
                pairs, done = pairs + found, done + len(batch)
                told(done, len(pairs))
    except torch.OutOfMemoryError as error:
        kept = f"; {output} has {len(pairs)} pairs already" if pairs else ""
        raise RunError(
            f"the device's memory does not hold {cfg.eval_batch_size} completions at once; give a smaller "
            f"eval_batch_size{kept}"
        ) from error
    except KeyboardInterrupt as error:
        kept = f"{output} has the {len(pairs)} pairs" if pairs else "there was no pair"
        raise Interrupted(f"stopped; {kept} of the first {done} of {cfg.prompts} prompts") from error
    finally:
        if file is not None:
            file.close()
    _close(cfg, pairs, output)


def _close(cfg: DictConfig, pairs: list[dict[str, Any]], output: Path) -> None:
    """Say what was made; raises RunError where nothing was."""
    if not pairs:
        raise RunError(
            f"none of {cfg.prompts} prompts has completions of different rewards; give more samples than "
            f"{cfg.samples}, a higher temperature than {cfg.temperature}, or other prompts (seed)"
        )
    chosen, rejected = (sum(p[f"{s}_reward"] for p in pairs) / len(pairs) for s in ("chosen", "rejected"))
    ties = cfg.prompts - len(pairs)
    log.info(
        "%d pairs of %d prompts, %d skipped as ties; mean reward of chosen %.3f, of rejected %.3f",
        *(len(pairs), cfg.prompts, ties, chosen, rejected),
    )
    log.info("Written: %s", output)
    log.info(
        "Train on it, with this task and model: algorithm=vrpo preferences=pairs preferences.path=%s", output
    )


def _new(output: Path) -> IO[bytes]:
    try:
        return output.open("xb")
    except OSError as error:
        raise RunError(f"output={output} can't be made ({error}); give another") from error


def _add(file: IO[bytes], pairs: list[dict[str, Any]]) -> None:
    """Write lines, so that whoever reads meets whole ones."""
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    # half a surrogate pair has no UTF-8; written with a backslash it is JSON for the same text
    file.write(text.encode("utf-8", errors="backslashreplace"))
    file.flush()


class _Told:
    """A progress bar, or a line now and then where standard output is no terminal."""

    def __init__(self, total: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.total = total
        self.started = self.last = time.monotonic()
        self.bar = self.progress.add_task("prompts", total=total, figures="first batch ...")

    def __enter__(self) -> _Told:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, done: int, pairs: int) -> None:
        """Tell that so many prompts are done, and how many pairs came of them."""
        now = time.monotonic()
        self.progress.update(self.bar, completed=done, figures=f"{pairs} pairs")
        if self.progress.disable and now - self.last > QUIET and done < self.total:
            self.last = now
            left = (now - self.started) / done * (self.total - done)
            log.info("%d of %d prompts, %d pairs, %.0f s left", done, self.total, pairs, left)


def main() -> None:
    """Run the command."""
    launch.run("pairs", job)
