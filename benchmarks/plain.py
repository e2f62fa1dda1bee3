"""The same work done the plain way: what the rollouts and updates of this project are compared with.

As the released training code does it, written anew from its description: every step runs the whole sequence
and its output head at every position, noise and softmax are taken over all of these logits, each row's tokens
are chosen in a loop, and nothing ends early; the update keeps log-softmax and softmax over the whole
vocabulary for its backward pass. The networks are this project's own, so that only the way of using them
differs. `tests/test_benchmarks.py` compares tokens, losses and gradients with those of the released code.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from spg.core.types import Experience, MaskedSamples
from spg.models.policy import Policy


def all_logits(policy: Policy, tokens: Tensor) -> Tensor:
    """Return the logits [N L V] of tokens [N L], none of which is padding."""
    return policy.network.logits(policy.network.hidden(tokens))


@torch.no_grad()
def rollout(
    policy: Policy,
    tokens: Tensor,
    width: int,
    block_size: int,
    steps: int,
    temperature: float,
    generator: torch.Generator | None = None,
    blocks: Iterable[int] | None = None,
) -> Tensor:
    """Decode tokens [N L], [MASK] in place behind a prompt of `width`, block after block; return [N L].

    steps: for the whole completion, as many for each block. Each step commits the tokens of the highest
    probability. Above temperature 0 they are drawn with Gumbel noise from `generator`, in the type of the
    logits. blocks: the numbers of those to decode; None: all.
    """
    tokens = tokens.clone()
    count = (tokens.shape[1] - width) // block_size
    each = steps // count
    for number in range(count) if blocks is None else blocks:
        start = width + number * block_size
        stop = start + block_size
        holes = (tokens[:, start:stop] == policy.mask_id).sum(-1)
        base, rest = (holes // each).tolist(), (holes % each).tolist()
        for step in range(each):
            # softmax and noise too, as under the released code's autocast
            with policy.autocast():
                chosen, confidence = choose(all_logits(policy, tokens), temperature, generator)
            masked = tokens == policy.mask_id
            confidence[:, stop:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            commit = torch.zeros_like(masked)
            for row in range(len(tokens)):
                wanted = base[row] + (step < rest[row])
                if wanted > 0:
                    commit[row, confidence[row].topk(wanted).indices] = True
            tokens[commit] = chosen[commit]
    return tokens


def choose(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return the chosen tokens [N L] and their probabilities [N L], from logits [N L V]."""
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        noise = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        chosen = (logits.exp() / (-torch.log(noise)) ** temperature).argmax(-1)
    return chosen, logits.softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def loss(policy: Policy, experience: Experience, samples: MaskedSamples, beta: float, omega: float) -> Tensor:
    """Return the released SPG loss [] of one group: ELBO if A > 0, else the mixture of it and the EUBO."""
    targets = experience.rollout.completion_ids
    with policy.autocast():
        logits = all_logits(policy, samples.tokens.flatten(0, 1))[:, -targets.shape[1] :]
        b, m, _ = samples.tokens.shape
        logps, probabilities = at_targets(logits.view(b, m, *logits.shape[1:]), targets)
    lengths = experience.rollout.completion_mask.sum(-1)
    return group_loss(logps, probabilities, samples.scored, lengths, experience.advantages, beta, omega)


def at_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and probabilities [B M T] of targets [B T], from logits [B M T V].

    Both log-softmax and softmax are computed and kept for the backward pass.
    """
    wanted = targets.unsqueeze(1).expand(logits.shape[:-1])
    flat = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
    probabilities = logits.softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    return -flat.view(wanted.shape), probabilities


def group_loss(
    logps: Tensor,
    probabilities: Tensor,
    scored: Tensor,
    lengths: Tensor,
    advantages: Tensor,
    beta: float,
    omega: float,
) -> Tensor:
    """Return the loss [] of one group, from log-probabilities, probabilities and scored [B M T].

    lengths [B] of the completions, advantages [B]. The ELBO divides by the number scored in each draw; the
    EUBO takes the mean over draws of p**beta / t with t the share scored, then the log, then the mean over
    tokens of which that is above 0; the loss weighs sequences by their length.
    """
    counts = scored.sum(-1)
    lower = ((logps * scored).sum(-1) / counts).mean(1)
    ratio = counts / lengths.unsqueeze(-1)
    mean = (probabilities**beta * scored / ratio.unsqueeze(-1)).mean(1)
    seen = mean > 0
    logs = torch.where(seen, mean, 1.0).log()
    upper = logs.sum(-1) / seen.sum(-1) / beta
    mixed = omega * upper + (1 - omega) * lower
    chosen = torch.where(advantages > 0, lower, mixed)
    return -(advantages * chosen * lengths).sum() / lengths.sum()
