"""The models of an evaluation: the base model and a run's checkpoints, one after the other in one policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from spg.collect import complete
from spg.config import build
from spg.decoding import Decoder
from spg.errors import InputError, RunError
from spg.generations import Item, Line, Source, Subject
from spg.policy import Policy
from spg.pretraining import build_policy, check_device, check_reads
from spg.runs import of_this_version
from spg.sources import BASE, DECODING, fingerprints, saved_by
from spg.tasks.base import Example, Task
from spg.weights import load_checkpoint, load_weights

# greedy decisions whose two best alternatives lie closer than this may turn with the batch's size
NEAR_TIE = 1e-4
# streams of an example's samples lie this far apart: further than there are examples
SAMPLES_APART = 2**32


def models(cfg: DictConfig, task: Task, examples: Sequence[Example]) -> Source:
    """Return the models that `cfg` asks for, each with `cfg.samples` completions of every example to make.

    Raises ConfigError where a run has no weights yet, where the device is not there, and where the model
    can't read the task's chats, all before a model is built; InputError for an example that it can't write.
    """
    check_device(cfg)
    check_reads(cfg, task, examples[0])
    torch.set_num_threads(cfg.threads)
    found: list[tuple[str, Path | None]] = [(BASE, None)]
    if cfg.run is not None:
        found += saved_by(Path(cfg.run), cfg.select)
    elif cfg.model.weights != BASE:
        found = [(str(cfg.model.weights), None)]
    decoder: Decoder = build(
        cfg.decoding, temperature=cfg.temperature, near_tie=NEAR_TIE if cfg.temperature == 0 else None
    )
    policy = build_policy(_before_training(cfg))
    if cfg.accelerator == "cuda" or (cfg.accelerator == "auto" and torch.cuda.is_available()):
        policy.to("cuda")
    policy.eval()
    one = torch.zeros(1, dtype=torch.long)
    for number, example in enumerate(examples):  # before the first is decoded, not in the middle
        prompt, template = task.prompt(example), task.template(example)
        try:
            policy.prepare([example], [prompt], [template], one, one, decoder.gen_length)
        except InputError as error:
            raise InputError(f"example {number} of split {cfg.split} can't be completed: {error}") from error
    items = [Item(i, s, example) for i, example in enumerate(examples) for s in range(cfg.samples)]
    device = torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type
    return Source(
        subjects=[
            Subject(name, items, partial(_complete, policy, decoder, task, cfg.seed), _loader(policy, path))
            for name, path in found
        ],
        settings={key: getattr(decoder, key) for key in DECODING}
        | {key: cfg[key] for key in ("samples", "seed", "eval_batch_size", "threads", "run", "generations")}
        | {
            "network": str(cfg.model.network._target_).rpartition(".")[2],
            "weights": str(cfg.model.weights),
            "lora": cfg.model.lora is not None,
        },
        made_with={"device": device} | fingerprints(cfg),
        device=device,
        precision=str(next(policy.parameters()).dtype).removeprefix("torch."),
        split=cfg.split,
        shots=task.shots,
    )


def _before_training(cfg: DictConfig) -> DictConfig:
    """Return the settings that base weights depend on: the run's own, whatever task is evaluated."""
    if cfg.run is None:
        return cfg
    trained = of_this_version(cfg.run)
    trained.model = cfg.model
    return trained


def _loader(policy: Policy, path: Path | None) -> Callable[[], None]:
    """Return what fills the policy from a run's file or folder; None is what it was built with."""

    def load() -> None:
        if path is None:
            return
        try:
            if path.suffix == ".ckpt":
                load_checkpoint(policy.network, path)
            elif path.suffix == ".safetensors":
                load_weights(policy.network, path)
            else:
                policy.load_adapter(path)
        except ValueError as error:
            raise RunError(str(error)) from error

    return load


def _complete(policy: Policy, decoder: Decoder, task: Task, seed: int, batch: Sequence[Item]) -> list[Line]:
    """Decode a batch; a sample's random draws derive from its example's and its own number alone."""
    examples = [item.example for item in batch]
    group = torch.tensor([item.index for item in batch])
    index = torch.tensor([item.index + SAMPLES_APART * item.sample for item in batch])
    try:
        rollout = complete(policy, decoder, task, examples, group, index, seed)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the device's memory does not hold {len(batch)} completions at once; go on with a smaller "
            "eval_batch_size"
        ) from error
    decoded = (rollout.commit_step >= 0).sum(-1).tolist()
    tokens = rollout.completion_mask.sum(-1).tolist()
    steps = [len(row[row >= 0].unique()) for row in rollout.commit_step.cpu()]
    ties = rollout.near_ties.tolist() if decoder.near_tie is not None else [None] * len(batch)
    return [
        {
            "prompt": task.prompt(item.example),
            "completion": text,
            "tokens": tokens[i],
            "decoded": decoded[i],
            "steps": steps[i],
            "near_ties": ties[i],
        }
        for i, (item, text) in enumerate(zip(batch, rollout.texts, strict=True))
    ]
