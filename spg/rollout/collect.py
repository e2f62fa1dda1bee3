"""From examples to experience: prompts, completions, rewards, advantages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spg.algorithms.advantages import Advantage
from spg.core.devices import send
from spg.core.examples import Example
from spg.core.seeding import derive_seed
from spg.core.types import Experience, Rollout
from spg.core.world import World
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder, logp_difference
from spg.tasks.base import Task
from spg.tasks.scoring import score_all


def roll_out(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    examples: Sequence[Example],
    group_size: int,
    seed: int,
    first: int = 0,
) -> Rollout:
    """Decode `group_size` completions of each of P examples.

    Args:
        policy: Completes the prompts.
        decoder: Decides how tokens are chosen.
        task: Gives the prompts and templates.
        examples: P examples.
        group_size: Number of completions of each example.
        seed: The random draws of a sequence derive from it and from the number of the sequence.
        first: Number of the first group; sequences are numbered accordingly.

    Returns:
        B = P * group_size completions, with those of an example in a row.
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
    """Decode one completion of each of B examples.

    Args:
        policy: Completes the prompts.
        decoder: Decides how tokens are chosen.
        task: Gives the prompts and templates.
        examples: B examples.
        group: [B] number of the prompt that a sequence belongs to.
        index: [B] number of the sequence.
        seed: The random draws of a sequence derive from it and from the index of the sequence.
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
class CollectionStats:
    """What a collection cost, and how exact its decoding was.

    Attributes:
        rollout: Seconds of decoding.
        reward: Seconds of scoring.
        tokens: Number of decoded tokens, [].
        logp_difference: [B] change of log-probabilities by a cache, in nats per token (see the function of
            this name in `spg.rollout.decoder`); None without a cache.
        steps: [B] decoding steps that committed a token; None if their number is fixed.
    """

    rollout: float
    reward: float
    tokens: Tensor
    logp_difference: Tensor | None
    steps: Tensor | None


def collect(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    advantage: Advantage,
    examples: Sequence[Example],
    group_size: int,
    seed: int,
    world: World | None = None,
) -> tuple[Experience, CollectionStats]:
    """Let the policy complete examples `group_size` times each, and score the completions.

    Args:
        policy: Completes the prompts.
        decoder: Decides how tokens are chosen.
        task: Gives prompts, templates and rewards.
        advantage: Turns rewards [P G] into advantages [P G]. It sees the rewards of all processes.
        examples: P examples, the same in all processes.
        group_size: Number of completions of each example, G.
        seed: The random draws of a sequence derive from it and from the number of the sequence.
        world: The processes that share the examples; a group never spans two of them.

    Returns:
        The experience of the sequences of this process, and what it cost.
    """
    world = world or World()
    first = world.stretch(len(examples)).start
    started = time.perf_counter()
    with policy.decoding():
        completed = roll_out(policy, decoder, task, world.share(examples), group_size, seed, first)
        decoded = time.perf_counter()
        difference = None
        if decoder.cache != "none":
            difference = logp_difference(policy, completed, derive_seed(seed, "difference"))
    compared = time.perf_counter()
    parts = score_all(task.reward, completed.examples, completed.texts, task.workers)
    reward_parts = {n: send(torch.tensor([p[n] for p in parts]), policy.device) for n in parts[0]}
    rewards = torch.stack(list(reward_parts.values())).sum(0)
    advantages = advantage(world.gather(rewards).view(-1, group_size)).flatten()
    start = first * group_size
    experience = Experience(completed, rewards, reward_parts, advantages[start : start + len(rewards)])
    ended = time.perf_counter()
    tokens = (completed.commit_step >= 0).sum()
    steps = None if decoder.rule is None else completed.steps_taken
    return experience, CollectionStats(decoded - started, ended - compared, tokens, difference, steps)
