"""From examples to experience: prompts, rollouts, rewards, advantages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spg.algorithms.advantages import Advantage
from spg.core.examples import Example
from spg.core.seeding import derive_seed
from spg.core.types import Experience, Rollout
from spg.core.world import World
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder, logp_difference
from spg.tasks.base import Task
from spg.tasks.scoring import score_all


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
    return complete(policy, decoder, task, repeated, group, index, seed)


def complete(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    examples: Sequence[Example],
    group: Tensor,
    index: Tensor,
    seed: int,
) -> Rollout:
    """Decode one completion of each of B examples; group and index [B] as in `Prompts`.

    A sequence's random draws derive from `seed` and its index.
    """
    prompts = policy.prepare(
        examples,
        [task.prompt(example) for example in examples],
        [task.template(example) for example in examples],
        group,
        index,
        decoder.gen_length,
    )
    return decoder(policy, prompts, seed)


@dataclass(frozen=True)
class Collected:
    """Seconds that the parts of a collection took, how many tokens it decoded, and how exactly.

    logp_difference [B]: what a cache changed (see `decoding.logp_difference`); None without one.
    """

    rollout: float
    reward: float
    tokens: int
    logp_difference: Tensor | None


def collect(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    advantage: Advantage,
    examples: Sequence[Example],
    group_size: int,
    seed: int,
    world: World | None = None,
) -> tuple[Experience, Collected]:
    """Let the policy complete P examples `group_size` times, and score what it wrote.

    The processes of `world` share the examples; a group never spans two of them. An advantage may depend on
    every reward, those of the other processes included; the result holds this process's sequences.
    """
    world = world or World()
    first = world.stretch(len(examples)).start
    started = time.perf_counter()
    was_training = policy.training
    policy.eval()
    done = rollout(policy, decoder, task, world.share(examples), group_size, seed, first)
    decoded = time.perf_counter()
    exact = decoder.cache == "none"
    apart = None if exact else logp_difference(policy, done, derive_seed(seed, "difference"))
    policy.train(was_training)
    compared = time.perf_counter()
    parts = score_all(task.reward, done.examples, done.texts, task.workers)
    reward_parts = {name: torch.tensor([p[name] for p in parts], device=policy.device) for name in parts[0]}
    rewards = torch.stack(list(reward_parts.values())).sum(0)
    advantages = advantage(world.gather(rewards).view(-1, group_size)).flatten()
    start = first * group_size
    experience = Experience(done, rewards, reward_parts, advantages[start : start + len(rewards)])
    ended = time.perf_counter()
    tokens = int((done.commit_step >= 0).sum())
    return experience, Collected(decoded - started, ended - compared, tokens, apart)
