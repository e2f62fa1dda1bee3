"""From the configuration of a run to its objects."""

from __future__ import annotations

from omegaconf import DictConfig

from spg.config import build
from spg.config.settings import Optimization
from spg.core.errors import InputError
from spg.models.factory import build_policy, check_reads
from spg.rollout.decoder import Decoder
from spg.rollout.prompt_order import PromptStream
from spg.rollout.recorded import Recorded, check_pairs
from spg.runs.identity import identity
from spg.tasks.base import Task
from spg.tasks.preferences import Preferences
from spg.training.module import Training
from spg.training.pretraining import ensure_base_weights


def load_task(cfg: DictConfig) -> Task:
    """Build the task with its examples.

    Raises:
        InputError: if a split has no examples, or if its file can't be read.
        ConfigError: if the model can't read the task's prompts.
    """
    task: Task = build(cfg.task)
    if cfg.get("preferences") is not None:  # runs of version 0.3 have no such key
        task = build(cfg.preferences, task=task)
    for split in ("train", "validation", "test"):
        if not task.examples(split):
            raise InputError(f"{task.name} has no examples of split {split}; give more held-out rows")
    # recorded pairs have prompts of their own, which are tried once the tokenizer is there
    first = task.examples("validation" if isinstance(task, Preferences) else "train")[0]
    check_reads(cfg, task.prompt(first), task.name)
    return task


def build_module(cfg: DictConfig, task: Task | None = None) -> Training:
    """Build the module of a run, with its weights.

    Args:
        cfg: Configuration of the run.
        task: The task that `load_task` made; None to make it here.
    """
    task = task or load_task(cfg)
    rollouts = -(-cfg.trainer.max_updates // cfg.mu)
    policy = build_policy(cfg, ensure_base_weights)
    sampler: Decoder = build(cfg.decoding)
    if isinstance(task, Preferences):
        sampler = Recorded(sampler.gen_length)
        check_pairs(policy, sampler, task)
    return Training(
        policy=policy,
        task=task,
        sampler=sampler,
        evaluator=build(cfg.decoding, temperature=0.0),
        advantage=build(cfg.advantage),
        masking=build(cfg.masking),
        objective=build(cfg.algorithm.objective),
        optimization=Optimization(**cfg.optimizer),
        prompts=PromptStream(task.examples("train"), cfg.trainer.prompts_per_rollout, rollouts, cfg.seed),
        mu=cfg.mu,
        group_size=cfg.group_size,
        max_updates=cfg.trainer.max_updates,
        seed=cfg.seed,
        micro_batch_size=cfg.trainer.micro_batch_size,
        cut_completions=cfg.trainer.get("cut_completions", False),  # not in runs of version 0.3
        eval_batch_size=cfg.trainer.eval_batch_size,
        identity=identity(cfg),
    )
