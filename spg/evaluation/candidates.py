"""The models of an evaluation: the base model and a run's checkpoints, one after the other in one policy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from spg.config import ConfigError, build
from spg.core.errors import InputError, RunError
from spg.core.examples import Example
from spg.evaluation.generations import Item, Line, Source, Subject
from spg.evaluation.sources import BASE, DECODING, fingerprints, saved_by
from spg.models.factory import base_name, build_policy, check_device, check_reads, device_of
from spg.models.lora import check_fits
from spg.models.network import Network
from spg.models.policy import Policy
from spg.models.weights import load_trained
from spg.rollout.collect import complete
from spg.rollout.decoder import Decoder
from spg.runs.directory import read_updated_config
from spg.tasks.base import Task

log = logging.getLogger(__name__)

# greedy decisions whose two best alternatives lie closer than this may turn with the batch's size
NEAR_TIE = 1e-4
# what results.json says of an evaluation beside its decoding and its model
SETTINGS = ("samples", "seed", "eval_batch_size", "threads", "run", "adapter", "generations")
# streams of an example's samples lie this far apart: further than there are examples
SAMPLES_APART = 2**32


def models(
    cfg: DictConfig, task: Task, examples: Sequence[Example], find_base: Callable[[DictConfig], Path]
) -> Source:
    """Return the models that `cfg` asks for, each with `cfg.samples` completions of every example to make.

    Raises ConfigError where a run has no weights yet, where the device is not there, where an adapter does
    not fit the model, and where this can't read the task's chats, all before weights are read; InputError
    for an example that it can't write.
    """
    check_device(cfg)
    check_reads(cfg, task.prompt(examples[0]), task.name)
    torch.set_num_threads(cfg.threads)
    adapter = None if cfg.get("adapter") is None else Path(cfg.adapter)
    if adapter is not None:
        check_adapter(cfg, adapter)
    weights = str(cfg.model.path if cfg.model.weights == "published" else cfg.model.weights)
    found: list[tuple[str, Path | None]] = [(BASE, None)]
    if cfg.run is not None:
        found += saved_by(Path(cfg.run), cfg.select)
    elif adapter is not None:
        found = [(adapter.name, None)]  # it is there from the start
    elif cfg.model.weights != BASE:
        found = [(weights, None)]
    decoder: Decoder = build(
        cfg.decoding, temperature=cfg.temperature, near_tie=NEAR_TIE if cfg.temperature == 0 else None
    )
    policy = build_policy(_to_build(cfg), find_base).to(device_of(cfg))
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
        | {key: cfg.get(key) for key in SETTINGS}
        | {
            "network": str(cfg.model.network._target_).rpartition(".")[2],
            "weights": weights,
            "lora": policy.has_adapter,
        },
        made_with={"device": device} | fingerprints(cfg),
        device=device,
        precision=precision(policy, cfg.model.get("quantization")),
        split=cfg.split,
        shots=task.shots,
    )


def check_adapter(cfg: DictConfig, folder: Path) -> None:
    """Raise ConfigError where the adapter in a PEFT folder does not fit the model; reads no weights.

    Where it was trained on another base, a line says so: a base may have moved, or be another's copy.
    """
    with torch.device("meta"):
        network: Network = build(cfg.model.network, seed=None)
        try:
            check_fits(network, build(cfg.model.lora))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    trained_on = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if trained_on and trained_on != base_name(cfg):
        base = base_name(cfg) or "random weights"
        log.warning("The adapter was trained on %s, and is evaluated on %s", trained_on, base)


def precision(policy: Policy, quantization: str | None) -> str:
    """Return in words what the network's own weights are kept in, and what they compute in."""
    own = (p for name, p in policy.network.named_parameters() if ".lora_" not in name)
    kinds = {str(p.dtype).removeprefix("torch.") for p in own if p.is_floating_point()}
    kept = " and ".join([*([] if quantization is None else [quantization]), *sorted(kinds)])
    return kept if policy.precision == "32-true" else f"{kept} weights, computed in {policy.precision}"


def _to_build(cfg: DictConfig) -> DictConfig:
    """Return the settings that weights depend on: the run's own, whatever task is evaluated.

    Without a run or an adapter's folder there is no adapter, whatever the model would be trained with.
    """
    if cfg.get("adapter") is not None:
        return cfg
    if cfg.run is None:
        bare = cfg.copy()
        bare.model.lora = None
        return bare
    trained = read_updated_config(cfg.run)
    trained.model = cfg.model
    trained.trainer.accelerator = cfg.accelerator
    return trained


def _loader(policy: Policy, path: Path | None) -> Callable[[], None]:
    """Return what fills the policy from a run's file or folder; None is what it was built with."""

    def load() -> None:
        if path is not None:
            load_trained(policy.network, path, policy.load_adapter if policy.has_adapter else None)

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
