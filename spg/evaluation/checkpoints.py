"""Models as candidates: the base model and a run's checkpoints, one after the other in one policy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from spg.config import ConfigError, build
from spg.core.errors import InputError, RunError
from spg.core.examples import Example
from spg.evaluation.candidates import Candidate, Candidates
from spg.evaluation.completer import Completer
from spg.evaluation.evaluator import Completion, Item
from spg.evaluation.selection import BASE, run_weights
from spg.evaluation.settings import DECODING_SETTINGS, RECORDED_SETTINGS, fingerprints
from spg.models.factory import base_name, build_policy, check_device, check_reads, device_of
from spg.models.lora import check_fits
from spg.models.network import Network
from spg.models.policy import Policy
from spg.models.weights import load_trained
from spg.rollout.decoder import Decoder
from spg.runs.directory import read_updated_config
from spg.tasks.base import Task

log = logging.getLogger(__name__)

# greedy choices whose two best alternatives lie closer than this may turn with the batch's size
NEAR_TIE = 1e-4


def model_candidates(
    cfg: DictConfig, task: Task, examples: Sequence[Example], find_base: Callable[[DictConfig], Path]
) -> Candidates:
    """Return the models that `cfg` asks for, each with `cfg.samples` completions of every example to make.

    Args:
        cfg: Settings of the evaluation.
        task: The task.
        examples: The examples of the split.
        find_base: Returns the file of base weights for a configuration.

    Raises:
        ConfigError: before weights are read, if a run has no weights yet, if the device is missing, if an
            adapter does not fit the model, or if the model can't read the task's chats.
        InputError: if the tokenizer can't write an example.
    """
    check_device(cfg)
    check_reads(cfg, task.prompt(examples[0]), task.name)
    torch.set_num_threads(cfg.threads)
    if cfg.get("adapter") is not None:
        check_adapter(cfg, Path(cfg.adapter))
    weights = str(cfg.model.path if cfg.model.weights == "published" else cfg.model.weights)
    models = _find_models(cfg, weights)
    near_tie = NEAR_TIE if cfg.temperature == 0 else None
    decoder: Decoder = build(cfg.decoding, temperature=cfg.temperature, near_tie=near_tie)
    policy = build_policy(_model_settings(cfg), find_base).to(device_of(cfg))
    policy.eval()
    check_examples(policy, task, examples, decoder.gen_length, cfg.split)
    items = [Item(i, s, example) for i, example in enumerate(examples) for s in range(cfg.samples)]
    complete = _name_remedy(Completer(policy, decoder, task, cfg.seed))
    device = torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type
    return Candidates(
        candidates=[Candidate(name, items, complete, _loader(policy, path)) for name, path in models],
        settings={key: getattr(decoder, key) for key in DECODING_SETTINGS}
        | {key: cfg.get(key) for key in RECORDED_SETTINGS}
        | {
            "network": str(cfg.model.network._target_).rpartition(".")[2],
            "weights": weights,
            "lora": policy.has_adapter,
        },
        made_with={"device": device} | fingerprints(cfg),
        device=device,
        precision=describe_precision(policy, cfg.model.get("quantization")),
        split=cfg.split,
        shots=task.shots,
    )


def check_adapter(cfg: DictConfig, folder: Path) -> None:
    """Check that the adapter in a PEFT folder fits the model, without reading weights.

    If it was trained on another base, a warning says so: a base may have moved, or be a copy of the other.

    Raises:
        ConfigError: if the adapter does not fit.
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


def check_examples(
    policy: Policy, task: Task, examples: Sequence[Example], gen_length: int, split: str
) -> None:
    """Raise InputError for the first example that the policy's tokenizer can't write."""
    one = torch.zeros(1, dtype=torch.long)
    for number, example in enumerate(examples):
        prompt, template = task.prompt(example), task.template(example)
        try:
            policy.prepare([example], [prompt], [template], one, one, gen_length)
        except InputError as error:
            raise InputError(f"example {number} of split {split} can't be completed: {error}") from error


def describe_precision(policy: Policy, quantization: str | None) -> str:
    """Return in words the types of the network's own weights, and the type they compute in."""
    own = (p for name, p in policy.network.named_parameters() if ".lora_" not in name)
    kinds = {str(p.dtype).removeprefix("torch.") for p in own if p.is_floating_point()}
    kept = " and ".join([*([] if quantization is None else [quantization]), *sorted(kinds)])
    return kept if policy.precision == "32-true" else f"{kept} weights, computed in {policy.precision}"


def _find_models(cfg: DictConfig, weights: str) -> list[tuple[str, Path | None]]:
    """Return name and path of each model; no path stands for what the policy is built with."""
    if cfg.run is not None:
        return [(BASE, None), *run_weights(Path(cfg.run), cfg.select)]
    if cfg.get("adapter") is not None:
        return [(Path(cfg.adapter).name, None)]
    return [(BASE if cfg.model.weights == BASE else weights, None)]


def _model_settings(cfg: DictConfig) -> DictConfig:
    """Return the settings that the model is built with: a run's own, whatever task is evaluated.

    Without a run or an adapter's folder the model has no adapter, even if it would be trained with one.
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
    """Return a function that loads a run's file or folder into the policy; without a path it does nothing."""

    def load() -> None:
        if path is not None:
            load_trained(policy.network, path, policy.load_adapter if policy.has_adapter else None)

    return load


def _name_remedy(complete: Completer) -> Callable[[Sequence[Item]], list[Completion]]:
    """Return `complete` with a remedy in the error if the device's memory is too small."""

    def complete_or_explain(items: Sequence[Item]) -> list[Completion]:
        try:
            return complete(items)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the device's memory does not hold {len(items)} completions at once; go on with a smaller "
                "eval_batch_size"
            ) from error

    return complete_or_explain
