"""From examples to experience: prompts, rollouts, rewards, advantages; and evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spg.advantages import Advantage
from spg.decoding import Decoder
from spg.policy import Policy
from spg.tasks.base import Example, Task
from spg.types import Experience, Rollout


def rollout(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    examples: Sequence[Example],
    group_size: int,
    seed: int,
    first: int = 0,
) -> Rollout:
    """Decode `group_size` completions of each of P examples, B = P * group_size, groups in a row.

    Groups are numbered from `first`, sequences accordingly; a sequence's random draws derive from
    `seed` and its number.
    """
    group = torch.arange(first, first + len(examples)).repeat_interleave(group_size)
    index = torch.arange(first * group_size, (first + len(examples)) * group_size)
    repeated = [example for example in examples for _ in range(group_size)]
    prompts = policy.prepare(
        repeated,
        [task.prompt(example) for example in repeated],
        [task.template(example) for example in repeated],
        group,
        index,
        decoder.gen_length,
    )
    return decoder(policy, prompts, seed)


@dataclass(frozen=True)
class Timing:
    """Seconds that the parts of a collection took, and how many tokens it decoded."""

    rollout: float
    reward: float
    tokens: int


def collect(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    advantage: Advantage,
    examples: Sequence[Example],
    group_size: int,
    seed: int,
) -> tuple[Experience, Timing]:
    """Let the policy complete P examples `group_size` times, and score what it wrote."""
    started = time.perf_counter()
    done = rollout(policy, decoder, task, examples, group_size, seed)
    decoded = time.perf_counter()
    parts = [task.reward(e, text) for e, text in zip(done.examples, done.texts, strict=True)]
    reward_parts = {name: torch.tensor([p[name] for p in parts], device=policy.device) for name in parts[0]}
    rewards = torch.stack(list(reward_parts.values())).sum(0)
    advantages = advantage(rewards.view(-1, group_size)).flatten()
    experience = Experience(done, rewards, reward_parts, advantages)
    ended = time.perf_counter()
    tokens = int((done.commit_step >= 0).sum())
    return experience, Timing(decoded - started, ended - decoded, tokens)


@dataclass(frozen=True)
class Evaluation:
    """Greedy results over n examples: measures {name: [n]} and the completions' texts."""

    measures: Mapping[str, np.ndarray]
    texts: tuple[str, ...]
    examples: tuple[Example, ...]

    def mean(self, name: str) -> float:
        """Return the mean of a measure over the examples."""
        return float(self.measures[name].mean())

    def interval(self, name: str, resamples: int = 2000) -> tuple[float, float]:
        """Return a 95% bootstrap interval of a measure's mean, resampling examples (percentile)."""
        values = self.measures[name]
        index = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
        low, high = np.quantile(values[index].mean(1), [0.025, 0.975])
        return float(low), float(high)


def evaluate(
    policy: Policy, decoder: Decoder, task: Task, examples: Sequence[Example], batch_size: int, seed: int = 0
) -> Evaluation:
    """Decode each example once and measure the completions; `seed` matters above temperature 0."""
    was_training = policy.training
    policy.eval()
    texts: list[str] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        texts += rollout(policy, decoder, task, batch, 1, seed, first=start).texts
    policy.train(was_training)
    rows = [task.measure(example, text) for example, text in zip(examples, texts, strict=True)]
    measures = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Evaluation(measures, tuple(texts), tuple(examples))
