"""Recorded completions in place of decoded ones (VRPO, Zhu et al. 2025), and how to make preference pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spg.core.errors import InputError
from spg.core.examples import Example
from spg.core.seeding import derive_seed
from spg.core.types import Prompts, Rollout
from spg.models.policy import Policy
from spg.rollout.collect import roll_out
from spg.rollout.decoder import Decoder, mask_through_first
from spg.tasks.base import Task
from spg.tasks.preferences import SIDES, Preferences, tokens_key
from spg.tasks.scoring import score_all

# number of pairs that `check_pairs` lays out together
CHECKED_TOGETHER = 64


class Recorded(Decoder):
    """Takes the place of a decoder, and gives each sequence its recorded completion.

    In a group of two, the sequence with the even number gets the chosen completion, and the other one the
    rejected completion. EOS fills the rest, and given tokens of a template stay. A completion of T tokens
    has no EOS, like one that was cut off. No decoding step committed any of its tokens.

    Args:
        gen_length: Number of completion tokens, T.
    """

    def __init__(self, gen_length: int) -> None:
        super().__init__(gen_length, block_size=gen_length, steps=1)

    def __call__(self, policy: Policy, prompts: Prompts, seed: int | None = None) -> Rollout:
        """Return B recorded completions.

        Args:
            policy: Gives the tokenizer.
            prompts: B prompts, whose examples are pairs.
            seed: Has no effect.

        Raises:
            InputError: if a completion is too long, does not fit its template, or holds EOS or [MASK].
        """
        sides = [SIDES[number % len(SIDES)] for number in prompts.index.tolist()]
        rows = [
            self._lay_out(policy, example, side, template, given)
            for example, side, template, given in zip(
                prompts.examples, sides, prompts.template.tolist(), prompts.given.tolist(), strict=True
            )
        ]
        completion = torch.tensor(rows, dtype=torch.long, device=prompts.ids.device)
        mask = mask_through_first(completion == policy.eos_id)
        return Rollout.of_completions(
            prompts,
            completion,
            mask,
            policy.texts(completion),
            tuple({**example, "side": side} for example, side in zip(prompts.examples, sides, strict=True)),
        )

    def _lay_out(
        self, policy: Policy, pair: Example, side: str, template: list[int], given: list[bool]
    ) -> list[int]:
        """Return the tokens [T] of one side of a pair."""
        ids = tokens_of(policy, pair, side)
        for name, token in (("end-of-text", policy.eos_id), ("mask", policy.mask_id)):
            if token in ids:
                raise InputError(
                    f"`{side}` holds the {name} token {policy.tokenizer.decode([token])!r}; leave it out"
                )
        if len(ids) > self.gen_length:
            raise InputError(
                f"`{side}` has {len(ids)} tokens and no room in gen_length={self.gen_length}; give "
                f"gen_length={len(ids) + 1} or more, or leave the line out"
            )
        for place, token in enumerate([*ids, policy.eos_id][: self.gen_length]):
            if given[place] and template[place] != token:
                found = "it ends" if place == len(ids) else f"it has {policy.tokenizer.decode([token])!r}"
                wanted = policy.tokenizer.decode([template[place]])
                raise InputError(
                    f"`{side}` does not fit the template of its example: at token {place + 1} {found}, where "
                    f"{wanted!r} is given; write it with the given parts in place"
                )
        rest = [policy.eos_id] * (self.gen_length - len(ids))
        # given tokens of the template stay, even after an end-of-text token in a hole
        return [t if fixed else own for own, t, fixed in zip(ids + rest, template, given, strict=True)]


def tokens_of(policy: Policy, pair: Example, side: str) -> list[int]:
    """Return the token ids of one side of a pair, without an end-of-text token.

    These are the recorded ids if they decode to the text, else those that the tokenizer gives the text: the
    ids may come from another tokenizer, or somebody may have edited the text.
    """
    ids: list[int] | None = pair.get(tokens_key(side))
    known = ids is not None and all(0 <= token < len(policy.tokenizer) for token in ids)
    if ids is not None and known and policy.tokenizer.decode(ids, skip_special_tokens=True) == pair[side]:
        return ids
    return policy.encode(pair[side])


def check_pairs(policy: Policy, recorded: Recorded, task: Preferences) -> None:
    """Lay out every pair of a task once, before training begins.

    Raises:
        InputError: for the first pair that the model cannot take; the message names file and line.
    """
    pairs = task.examples("train")
    for at in range(0, len(pairs), CHECKED_TOGETHER):
        batch = pairs[at : at + CHECKED_TOGETHER]
        try:
            roll_out(policy, recorded, task, batch, len(SIDES), 0)
        except InputError:
            for pair in batch:
                try:
                    roll_out(policy, recorded, task, [pair], len(SIDES), 0)
                except InputError as error:
                    raise InputError(f"{task.path}, line {pair['line']}: {error}") from error
            raise


def make_pairs(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    examples: Sequence[Example],
    samples: int,
    batch_size: int,
    seed: int,
) -> Iterator[list[dict[str, Any] | None]]:
    """Make preference pairs: of several completions of an example, prefer the best to the worst.

    Args:
        policy: Completes the prompts.
        decoder: Decides how tokens are chosen.
        task: Gives prompts and rewards.
        examples: The examples, one pair each.
        samples: Number of completions of each example.
        batch_size: Number of completions to decode together, at least those of one example. It changes no
            draw.
        seed: The random draws of a completion derive from it and from the number of the completion.

    Yields:
        The pairs of a batch of examples, as lines of a file with the two rewards added. A pair is None if all
        rewards of its example are equal. Of equally good completions the first one counts.
    """
    count = max(1, batch_size // samples)
    for at in range(0, len(examples), count):
        batch = examples[at : at + count]
        completed = roll_out(policy, decoder, task, batch, samples, derive_seed(seed, "pairs"), at)
        parts = score_all(task.reward, completed.examples, completed.texts, task.workers)
        rewards = [sum(part.values()) for part in parts]
        yield [
            _pair_of(policy, task, example, completed, rewards, slice(n * samples, (n + 1) * samples))
            for n, example in enumerate(batch)
        ]


def _pair_of(
    policy: Policy, task: Task, example: Example, completed: Rollout, rewards: list[float], group: slice
) -> dict[str, Any] | None:
    """Return the pair of the completions in the rows `group`, or None if all rewards are equal."""
    rows = range(group.start, group.stop)
    best, worst = max(rows, key=rewards.__getitem__), min(rows, key=rewards.__getitem__)
    if rewards[best] == rewards[worst]:
        return None
    line: dict[str, Any] = {"prompt": task.prompt(example)}
    for side, row in zip(SIDES, (best, worst), strict=True):
        text = completed.texts[row]
        line[side] = text
        ids = _up_to_end(completed.completion_ids[row], policy.eos_id)
        if not _reads_as(policy, text, ids):
            line[tokens_key(side)] = ids
        line[f"{side}_reward"] = rewards[row]
    return line | {"example": dict(example)}


def _up_to_end(completion_ids: Tensor, eos_id: int) -> list[int]:
    ids: list[int] = completion_ids.tolist()
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _reads_as(policy: Policy, text: str, ids: list[int]) -> bool:
    """Return whether the tokenizer of the model reads a text as these tokens."""
    try:
        return policy.encode(text) == ids
    except InputError:
        return False
