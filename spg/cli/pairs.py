"""`python -m spg.pairs task=sudoku output=pairs.jsonl`: preference pairs of a model's own completions."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from spg import config
from spg.cli import base_weights, launch
from spg.config import ConfigError
from spg.core.console import take_over_logging
from spg.core.errors import InputError, Interrupted, RunError
from spg.core.progress import Progress
from spg.models import hub

log = logging.getLogger(__name__)


def job(cfg: DictConfig) -> None:
    """Make the file as configured; raise ConfigError before the model is built."""
    cfg = settings(cfg, list(HydraConfig.get().overrides.task))
    output = destination(cfg)
    make(cfg, output)


def settings(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration with what is settled before a model is built.

    Raises:
        ConfigError: if the settings can't give pairs.
    """
    config.check(cfg)
    if cfg.samples < 2:
        raise ConfigError(f"samples={cfg.samples}: a pair is two completions of a prompt; give samples=8")
    if any(line.lstrip("+").startswith("decoding.temperature=") for line in overrides):
        raise ConfigError(
            f"decoding.temperature={cfg.decoding.temperature} is that of rollouts in training; pairs have "
            f"their own: temperature={cfg.decoding.temperature}"
        )
    for note in (*config.unread_steps(cfg, overrides), *config.decoding_notes(cfg)):
        log.warning(note)
    own = hub.settle(cfg).copy()
    own.model.lora = None  # an adapter that was not trained changes nothing
    return own


def destination(cfg: DictConfig) -> Path:
    """Return the file to make, and make its folder; raise ConfigError if that is not possible."""
    output = Path(cfg.output)
    if output.exists():
        raise ConfigError(f"output={output} is there already; remove it, or give another")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output} can't be written ({error}); give another") from error
    return output


def make(cfg: DictConfig, output: Path) -> None:
    """Build the task and the model, and write preference pairs to `output`.

    Raises:
        InputError: if there are too few training examples.
        RunError: if no prompt gives a pair, or the memory of the device is too small.
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
    written = PairsFile(output)
    try:
        write_pairs(batches, written, cfg.prompts)
    except torch.OutOfMemoryError as error:
        kept = f"; {output} has {len(written.rewards)} pairs already" if written.rewards else ""
        raise RunError(
            f"the device's memory does not hold {cfg.eval_batch_size} completions at once; give a smaller "
            f"eval_batch_size{kept}"
        ) from error
    finally:
        written.close()
    report(written, cfg)


class PairsFile:
    """A file of preference pairs that is made with the first pair.

    Attributes:
        path: The file.
        rewards: Rewards of the chosen and the rejected completion of each pair that is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rewards: list[tuple[float, float]] = []
        self._file: IO[bytes] | None = None

    def add(self, pairs: Sequence[Mapping[str, Any]]) -> None:
        """Append pairs, so that a reader meets whole lines only; raise RunError if the file can't be made."""
        if self._file is None and pairs:
            try:
                self._file = self.path.open("xb")
            except OSError as error:
                raise RunError(f"output={self.path} can't be made ({error}); give another") from error
        if self._file is not None:
            text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
            # half a surrogate pair has no UTF-8; with a backslash it is JSON for the same text
            self._file.write(text.encode("utf-8", errors="backslashreplace"))
            self._file.flush()
        self.rewards += [(pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs]

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()


def write_pairs(batches: Iterable[Sequence[dict[str, Any] | None]], file: PairsFile, prompts: int) -> None:
    """Write the pairs of all batches as they are found.

    Args:
        batches: For each prompt of a batch its pair, or None if its completions have equal rewards.
        file: Where to write.
        prompts: Number of prompts in all batches.

    Raises:
        Interrupted: after Ctrl-C.
    """
    done = 0
    try:
        with Progress("prompts", prompts) as progress:
            for batch in batches:
                file.add([pair for pair in batch if pair is not None])
                done += len(batch)
                progress.update(done, f"{len(file.rewards)} pairs")
    except KeyboardInterrupt as error:
        kept = f"{file.path} has the {len(file.rewards)} pairs" if file.rewards else "there was no pair"
        raise Interrupted(f"stopped; {kept} of the first {done} of {prompts} prompts") from error


def report(file: PairsFile, cfg: DictConfig) -> None:
    """Say what was made; raise RunError if no prompt gave a pair."""
    number = len(file.rewards)
    if not number:
        raise RunError(
            f"none of {cfg.prompts} prompts has completions of different rewards; give more samples than "
            f"{cfg.samples}, a higher temperature than {cfg.temperature}, or other prompts (seed)"
        )
    chosen, rejected = (sum(rewards) / number for rewards in zip(*file.rewards, strict=True))
    log.info(
        "%d pairs of %d prompts, %d skipped as ties; mean reward of chosen %.3f, of rejected %.3f",
        *(number, cfg.prompts, cfg.prompts - number, chosen, rejected),
    )
    log.info("Written: %s", file.path)
    log.info(
        "Train on it, with this task and model: algorithm=vrpo preferences=pairs %s",
        shlex.quote(f"preferences.path={file.path}"),
    )


def main() -> None:
    """Run the command."""
    launch.run("pairs", job)
