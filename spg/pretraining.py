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

from spg.collect import Evaluation, evaluate
from spg.config import ConfigError, build
from spg.data import PromptStream
from spg.decoding import Decoder, through_first
from spg.estimators import ELBO
from spg.masking import Random
from spg.policy import Policy
from spg.seeding import derive_seed
from spg.tasks.base import Example, Task
from spg.types import Rollout
from spg.weights import load_weights, save_weights

log = logging.getLogger(__name__)

# raised when the same settings begin to mean other weights
VERSION = 2
ASSETS = Path(__file__).parent / "assets"


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
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        completion_ids=completion,
        completion_mask=through_first(completion == policy.eos_id),
        given=prompts.given,
        group=prompts.group,
        index=prompts.index,
        commit_step=torch.full_like(completion, -1),
        near_ties=torch.zeros_like(prompts.index),
        texts=tuple(texts),
        examples=tuple(examples),
    )


def combination(cfg: DictConfig) -> dict[str, Any]:
    """Return all that base weights depend on: model, task and pretraining settings."""
    # base weights are made on generated examples, whatever file or reward the run itself uses
    left_out = {
        "model": ["weights", "lora"],
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
    """Raise ConfigError where `cfg` asks for a CUDA device and there is none."""
    key = "trainer.accelerator" if "trainer" in cfg else "accelerator"
    if OmegaConf.select(cfg, key) == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}=cuda: torch finds no CUDA device here; give {key}=cpu, or auto")


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
    """Build the configured policy with its weights, base, random or a file's, and its adapter."""
    policy = Policy(build(cfg.model.network), build(cfg.model.tokenizer))
    _load(policy, cfg)
    if cfg.model.lora is not None:
        policy.adapt(build(cfg.model.lora))
    return policy


def _load(policy: Policy, cfg: DictConfig) -> None:
    if cfg.model.weights == "random":
        return
    path = base_weights(cfg) if cfg.model.weights == "base" else Path(cfg.model.weights)
    try:
        load_weights(policy.network, path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    log.info("Weights: %s", path)


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
