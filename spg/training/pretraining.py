"""Base weights for small models: supervised training on solver-made completions."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from spg.algorithms.estimators import ELBO
from spg.algorithms.masking import Random
from spg.config import ConfigError, build
from spg.core.examples import Example
from spg.core.seeding import derive_seed
from spg.core.types import Rollout
from spg.evaluation.completer import Completer
from spg.evaluation.evaluator import Evaluation, evaluate
from spg.models import base_weights
from spg.models.factory import check_device, check_reads
from spg.models.policy import Policy
from spg.models.weights import save_weights
from spg.rollout.decoder import Decoder, mask_through_first
from spg.rollout.prompt_order import PromptStream
from spg.tasks.base import Task
from spg.training.environment import fixed_arguments

log = logging.getLogger(__name__)

# steps after which pretraining says how long it takes
TIMED = 20


class Pretraining(pl.LightningModule):
    """Maximizes the ELBO of solver-made completions: masked diffusion training.

    Each completion is masked once, with a uniform number of masked holes. AdamW, with a linear decay to 0.

    Args:
        policy: What is trained.
        task: Gives prompts, templates and solved completions of the examples.
        gen_length: Number of completion tokens.
        steps: Number of optimizer steps.
        lr: Learning rate of the first step.
        seed: Seed of the masks.
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
        self._began = 0.0  # value of time.perf_counter() when training began

    def training_step(self, examples: list[Example], batch_idx: int) -> Tensor:
        """Return the mean negative ELBO, in nats per token."""
        targets = solved_rollout(self.policy, self.task, examples, self.gen_length)
        samples = self.masking(targets, self.policy.mask_id, derive_seed(self.seed, "pretrain", batch_idx))
        token_logps = self.policy.token_logps(
            samples.tokens[:, 0], targets.attention_mask, targets.completion_ids, samples.scored[:, 0]
        )
        return -self.elbo(token_logps.unsqueeze(1), samples).sum(-1).mean()

    def on_train_start(self) -> None:
        """Note when training began."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: list[Example], batch_idx: int) -> None:
        """Say how long training takes, as soon as some steps tell that."""
        if batch_idx + 1 == TIMED < self.steps:
            seconds = (time.perf_counter() - self._began) / TIMED * (self.steps - TIMED)
            log.info("Pretraining ends in about %.0f s", seconds)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its linear decay."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.99), fused=True)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def solved_rollout(policy: Policy, task: Task, examples: list[Example], gen_length: int) -> Rollout:
    """Return solver-made completions as if the policy had decoded them; the holes are to be learned."""
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
    # `prepare` pads a completion that is given as a whole with EOS
    solved = policy.prepare(
        examples, texts, [(text,) for text in texts], prompts.group, prompts.index, gen_length
    )
    completion = solved.template
    mask = mask_through_first(completion == policy.eos_id)
    return Rollout.of_completions(prompts, completion, mask, tuple(texts), tuple(examples))


def ensure_base_weights(cfg: DictConfig) -> Path:
    """Return the file of a configuration's base weights; train them now if they are not there yet."""
    path = base_weights.look_up(cfg)
    if path is not None:
        return path
    log.info("No base weights are there for these settings: pretraining (%d steps) ...", cfg.pretrain.steps)
    return pretrain(cfg, base_weights.cache_dir())


def pretrain(cfg: DictConfig, folder: Path) -> Path:
    """Train base weights, and write them and their model card.

    Args:
        cfg: Configuration of a run or of another command, with the settings of pretraining.
        folder: Where to write.

    Returns:
        The file of the weights.

    Raises:
        ConfigError: if the device is missing, or the model is a published one or can't read the task.
    """
    started = time.perf_counter()
    check_device(cfg)
    if cfg.model.get("path") is not None:
        raise ConfigError(
            f"this model is published ({cfg.model.path}) and has weights; base weights are for small "
            "models: model=tiny, or model=llada_toy"
        )
    # without task.path, whose rows may be held out: examples are generated, or read from a training file
    task: Task = build(cfg.task, **({"path": None} if "path" in cfg.task else {}))
    demonstrations = task.demonstrations()
    check_reads(cfg, task.prompt(demonstrations[0]), task.name)
    numbers = cfg.pretrain
    network = build(cfg.model.network, seed=numbers.seed)
    policy = Policy(network, build(cfg.model.tokenizer))
    module = Pretraining(policy, task, cfg.gen_length, numbers.steps, numbers.lr, numbers.seed)
    stream = PromptStream(demonstrations, numbers.batch_size, numbers.steps, numbers.seed)
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator if "trainer" in cfg else cfg.accelerator,
        devices=1,
        max_steps=numbers.steps,
        logger=False,
        **fixed_arguments(folder, alone=True),
    )
    trainer.fit(module, DataLoader(stream, batch_size=None))
    seconds = time.perf_counter() - started
    decoder: Decoder = build(cfg.decoding, temperature=0.0)
    result = evaluate(Completer(policy, decoder, task), task, task.examples("validation"), 256)
    path = folder / base_weights.file_name(cfg)
    save_weights(
        policy.network, path, {"spg": json.dumps(base_weights.fingerprint_settings(cfg), sort_keys=True)}
    )
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
    settings = json.dumps(base_weights.fingerprint_settings(cfg), indent=2, sort_keys=True)
    figures = "\n".join(
        f"- {measure}: {result.mean(measure):.3f} "
        f"({interval.low:.3f} to {interval.high:.3f}, {interval.method})"
        for measure, interval in ((name, result.interval(name)) for name in result.measures)
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

Greedy decoding of {len(result.texts)} validation examples, with 95% intervals:

{figures}

Settings that the file name's fingerprint is made of:

```json
{settings}
```
"""
