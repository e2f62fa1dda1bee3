"""Base weights: supervised training on solver-made completions, and where the result is kept.

A combination of model, task and pretraining settings has a fingerprint; its weights are looked for
in the package, then in the cache, and made and cached where neither has them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from spg.algorithms.estimators import ELBO
from spg.algorithms.masking import Random
from spg.config import ConfigError, build
from spg.core.errors import InputError
from spg.core.seeding import derive_seed
from spg.core.types import Rollout
from spg.models.hub import CONFIG, WEIGHTS, config_fields, folder_of, sizes
from spg.models.lora import name_base
from spg.models.network import Network
from spg.models.policy import Policy
from spg.models.quantization import check_nf4, prepare_nf4, quantise
from spg.models.weights import load_published, load_weights, save_weights
from spg.rollout.collect import Evaluation, evaluate
from spg.rollout.decoder import Decoder, through_first
from spg.rollout.prompt_order import PromptStream
from spg.tasks.base import Example, Task

log = logging.getLogger(__name__)

# raised when the same settings begin to mean other weights
VERSION = 2
ASSETS = Path(__file__).parent.parent / "assets"
# what the model's settings were before there was a choice
BEFORE: dict[str, Any] = {
    "dtype": "float32",
    "quantization": None,
    "precision": "32-true",
    "checkpointing": False,
    "compile": False,
}


class Pretraining(pl.LightningModule):
    """Maximises the ELBO of solver-made completions: masked diffusion training.

    One draw a completion, a uniform number of holes masked, AdamW with a linear decay to 0.
    """

    def __init__(self, policy: Policy, task: Task, gen_length: int, steps: int, lr: float, seed: int) -> None:
        super().__init__()
        self.policy = policy
        self.task = task
        self.gen_length = gen_length
        self.steps = steps
        self.lr = lr
        self.masking = Random(num_mc=1, prompt_mask_prob=0.0)
        self.elbo = ELBO()
        self.seed = seed

    def training_step(self, examples: list[Example], batch_idx: int) -> Tensor:
        """Return the mean negative ELBO a token, in nats."""
        targets = as_rollout(self.policy, self.task, examples, self.gen_length)
        samples = self.masking(targets, self.policy.mask_id, derive_seed(self.seed, "pretrain", batch_idx))
        token_logps = self.policy.token_logps(
            samples.tokens[:, 0], targets.attention_mask, targets.completion_ids, samples.scored[:, 0]
        )
        return -self.elbo(token_logps.unsqueeze(1), samples).sum(-1).mean()

    def configure_optimizers(self) -> Any:
        """Return AdamW and its linear decay."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.99), fused=True)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def as_rollout(policy: Policy, task: Task, examples: list[Example], gen_length: int) -> Rollout:
    """Lay solver-made completions out as if the policy had decoded them, holes open to be learned."""
    templates = [task.template(example) for example in examples]
    prompts = policy.prepare(
        examples,
        [task.prompt(example) for example in examples],
        templates,
        torch.arange(len(examples)),
        torch.arange(len(examples)),
        gen_length,
    )
    texts = [task.target(example) for example in examples]
    # `prepare` lays a wholly given completion out, padded with EOS
    solved = policy.prepare(
        examples, texts, [(text,) for text in texts], prompts.group, prompts.index, gen_length
    )
    completion = solved.template
    mask = through_first(completion == policy.eos_id)
    return Rollout.of_completions(prompts, completion, mask, tuple(texts), tuple(examples))


def combination(cfg: DictConfig) -> dict[str, Any]:
    """Return all that base weights depend on: model, task and pretraining settings."""
    # base weights are made on generated examples, whatever file or reward the run itself uses
    left_out = {
        "model": ["weights", "lora", "path", "revision", "prompt_style", *BEFORE],
        "task": ["reward", "eval_size", "path", "parser", "prompt_file"],
        "pretrain": [],
    }
    kept: dict[str, Any] = {"gen_length": cfg.gen_length, "version": VERSION}
    for part, unrelated in left_out.items():
        settings = OmegaConf.to_container(cfg[part], resolve=True)
        assert isinstance(settings, dict)
        kept[part] = {key: value for key, value in settings.items() if key not in unrelated}
    return kept


def file_name(cfg: DictConfig) -> str:
    """Return the file name of a combination's base weights."""
    text = json.dumps(combination(cfg), sort_keys=True)
    parts = [cfg.task._target_.rpartition(".")[2].lower(), cfg.task.get("format")]
    name = "-".join(part for part in parts if part is not None)
    return f"base-{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def cache_dir() -> Path:
    """Return the folder of weights made here: $SPG_CACHE, or spg below the user's cache folder."""
    if "SPG_CACHE" in os.environ:
        return Path(os.environ["SPG_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spg"


def check_device(cfg: DictConfig) -> None:
    """Raise ConfigError where `cfg` asks for a CUDA device, or what needs one, and there is none."""
    key = "trainer.accelerator" if "trainer" in cfg else "accelerator"
    if OmegaConf.select(cfg, key) == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}=cuda: torch finds no CUDA device here; give {key}=cpu, or auto")
    check_nf4_of(cfg)


def check_reads(cfg: DictConfig, task: Task, example: Example) -> None:
    """Raise ConfigError where the task asks in chats, and the model's tokenizer has no template for these."""
    if isinstance(task.prompt(example), str) or build(cfg.model.tokenizer).chat_template is not None:
        return
    name = cfg.model.tokenizer._target_.rpartition(".")[2]
    bare = "task.prompt_style=bare, or " if "prompt_style" in cfg.task else ""
    raise ConfigError(
        f"this model can't read chats, in which {task.name} asks: its tokenizer ({name}) has no chat "
        f"template; choose {bare}an instruction-tuned model (model=...)"
    )


def build_policy(cfg: DictConfig) -> Policy:
    """Build the configured policy with its weights and its adapter, which are trained in float32.

    Weights are base (trained here), published, random or a file's; raises ConfigError where they can't be had
    or don't fit. What is not trained is kept in model.dtype, or in 4 bits. Networks other than base ones are
    made where they are used, tensor by tensor.
    """
    check_nf4_of(cfg)
    tokenizer = build(cfg.model.tokenizer)
    network = _base(cfg) if cfg.model.weights == "base" else _large(cfg, tokenizer)
    name_base(network, base_name(cfg))
    network.checkpointing = setting(cfg, "checkpointing")
    policy = Policy(network, tokenizer, setting(cfg, "precision"))
    if cfg.model.lora is not None:
        policy.adapt(build(cfg.model.lora))
    if setting(cfg, "compile"):
        network.compile_layers()
    return policy


def setting(cfg: DictConfig, name: str) -> Any:
    """Return a setting of the model; one that a run of version 0.3 does not have is what it was there."""
    if name == "precision" and name not in cfg.model and "trainer" in cfg:  # its place then
        return cfg.trainer.get(name, BEFORE[name])
    return cfg.model.get(name, BEFORE[name])


def device_of(cfg: DictConfig) -> torch.device:
    """Return the device that a process of a run or an evaluation computes on."""
    kind = OmegaConf.select(cfg, "trainer.accelerator" if "trainer" in cfg else "accelerator")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_nf4_of(cfg: DictConfig) -> None:
    """Raise ConfigError where `cfg` asks for weights in 4 bits, and device or library are not there."""
    if setting(cfg, "quantization") is None:
        return
    try:
        check_nf4(device_of(cfg))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def base_name(cfg: DictConfig) -> str | None:
    """Return the name of the weights that an adapter is trained on: hub id, folder or file; None: random."""
    if cfg.model.weights == "random":
        return None
    if cfg.model.weights == "base":
        return file_name(cfg)
    name = cfg.model.path if cfg.model.weights == "published" else cfg.model.weights
    return str(name)


def _base(cfg: DictConfig) -> Network:
    """Build a small network with base weights, which are made now where there are none."""
    path = base_weights(cfg)
    network: Network = build(cfg.model.network)
    try:
        load_weights(network, path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    log.info("Weights: %s", path)
    return network.to(_dtype(cfg))


def _large(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Network:
    """Build a network with other weights where it is used and in its type, without a copy on the way."""
    device, dtype = device_of(cfg), _dtype(cfg)
    nf4 = setting(cfg, "quantization") == "nf4"
    with torch.device("meta"):
        network: Network = build(cfg.model.network, seed=None)
    if len(tokenizer) > network.head_width:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model's head {network.head_width} rows; "
            "give the tokenizer that belongs to the model (model.tokenizer)"
        )
    if cfg.model.weights == "random":
        network.to(dtype).to_empty(device=device)
        network.initialise(OmegaConf.select(cfg, "pretrain.seed", default=0))
        if nf4:
            quantise(network, device, dtype)
        return network
    try:
        place = Path(cfg.model.weights)
        if cfg.model.weights == "published":
            place = folder_of(cfg.model.path, cfg.model.get("revision"), WEIGHTS)
            if (place / CONFIG).is_file():  # else the tensors' shapes tell
                _check_config(cfg, place, tokenizer)
        files = load_published(
            network, place, dtype, device, prepare_nf4(network, device, dtype) if nf4 else None
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    kept = "nf4 and " if nf4 else ""
    log.info(
        "Weights: %s (%d files), in %s%s on %s", place, files, kept, str(dtype).removeprefix("torch."), device
    )
    return network


def _dtype(cfg: DictConfig) -> torch.dtype:
    """Return the type of the network's own weights: what a run trains is float32."""
    trained = cfg.model.lora is None and "trainer" in cfg
    name: str = "float32" if trained else setting(cfg, "dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_config(cfg: DictConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where a published folder has other sizes than `cfg`, or another mask.

    Sizes of a local folder are in `cfg` already.
    """
    fields, file = config_fields(folder), folder / CONFIG
    own = cfg.model.network.config
    for name, value in sizes(cfg.model.network._target_, fields, file).items():
        if own[name] != value:
            raise InputError(
                f"model.network.config.{name}={own[name]}, but {file} of {cfg.model.path} says {value}; give "
                f"model.network.config.{name}={value}, or another model.path"
            )
    mask = fields.get("mask_token_id")
    if mask is not None and mask != tokenizer.mask_token_id:
        raise InputError(
            f"{file} says mask_token_id={mask}, and the tokenizer's mask is {tokenizer.mask_token} "
            f"({tokenizer.mask_token_id}); give the model's own tokenizer, or another model.path"
        )


def base_weights(cfg: DictConfig) -> Path:
    """Return the file of a combination's base weights, shipped, cached or made now."""
    name = file_name(cfg)
    for folder in (ASSETS, cache_dir()):
        if (folder / name).is_file():
            return folder / name
    log.info("No base weights ship for this combination: pretraining (%d steps) ...", cfg.pretrain.steps)
    return pretrain(cfg, cache_dir())


def pretrain(cfg: DictConfig, folder: Path) -> Path:
    """Train base weights, write them and their card to `folder`, and return the weights' file."""
    started = time.perf_counter()
    check_device(cfg)
    if cfg.model.get("path") is not None:
        raise ConfigError(
            f"this model is published ({cfg.model.path}) and has weights; base ones are made of small "
            "models: model=tiny, or model=llada_toy"
        )
    # those of a file may be held out: only generated examples, or a training file, are learned here
    task: Task = build(cfg.task, path=None)
    demonstrations = task.demonstrations()
    check_reads(cfg, task, demonstrations[0])
    numbers = cfg.pretrain
    network = build(cfg.model.network, seed=numbers.seed)
    policy = Policy(network, build(cfg.model.tokenizer))
    module = Pretraining(policy, task, cfg.gen_length, numbers.steps, numbers.lr, numbers.seed)
    stream = PromptStream(demonstrations, numbers.batch_size, numbers.steps, numbers.seed)
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator if "trainer" in cfg else cfg.accelerator,
        devices=1,
        max_steps=numbers.steps,
        max_epochs=1,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(stream, batch_size=None))
    seconds = time.perf_counter() - started
    decoder: Decoder = build(cfg.decoding, temperature=0.0)
    result = evaluate(policy, decoder, task, task.examples("validation"), 256)
    path = folder / file_name(cfg)
    save_weights(policy.network, path, {"spg": json.dumps(combination(cfg), sort_keys=True)})
    path.with_suffix(".md").write_text(card(cfg, policy, result, seconds, path.name), encoding="utf-8")
    log.info("Pretrained in %.0f s; %s", seconds, describe(result))
    return path


def describe(result: Evaluation) -> str:
    """Return the measures of an evaluation in words."""
    return ", ".join(f"{name} {result.mean(name):.3f}" for name in result.measures)


def card(cfg: DictConfig, policy: Policy, result: Evaluation, seconds: float, name: str) -> str:
    """Return a model card: what the weights are, the command, the data, the figures."""
    parameters = sum(p.numel() for p in policy.network.parameters())
    arguments = [a for a in sys.argv[1:] if not a.startswith(("output=", "hydra."))]
    command = shlex.join(["python", "-m", "spg.pretrain", *arguments])
    settings = json.dumps(combination(cfg), indent=2, sort_keys=True)
    figures = "\n".join(
        f"- {measure}: {result.mean(measure):.3f} "
        f"({result.interval(measure)[0]:.3f} to {result.interval(measure)[1]:.3f})"
        for measure in result.measures
    )
    return f"""# {name}

A base model for reinforcement learning: {parameters:,} parameters, masked diffusion training (the
negative ELBO) for {cfg.pretrain.steps} steps of {cfg.pretrain.batch_size} completions,
{seconds:.0f} s on {torch.get_num_threads()} CPU threads. It is stopped early on purpose: what is left to
learn is what reinforcement learning shows.

- Command: `{command}`
- Seed: {cfg.pretrain.seed}
- Data: demonstrations of the task's training split, with a solver's completions; nothing held out was seen.
- Libraries: torch {torch.__version__}, lightning {pl.__version__}
- Licence: MIT, as the project

Greedy decoding of {len(result.texts)} validation examples, with 95% bootstrap intervals:

{figures}

Settings that the file name's fingerprint is made of:

```json
{settings}
```
"""
