"""Preference pairs: a file of them in the place of rollouts (VRPO, Zhu et al. 2025), and making such a file.

A pair is two completions of a prompt, of which one is chosen and the other rejected. The file has a JSON
object a line: `prompt` (a text, or a chat as a list of messages), `chosen`, `rejected` (texts up to their
end), `example` (the task's own, where its template needs one), and `chosen_tokens`, `rejected_tokens` (ids up
to their end) where a text alone would be read as other tokens than those that were decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spg.core.errors import InputError
from spg.core.seeding import derive_seed
from spg.core.types import Prompts, Rollout
from spg.evaluation.generations import scored
from spg.models.policy import Policy
from spg.rollout.collect import rollout
from spg.rollout.decoder import Decoder, through_first
from spg.tasks.base import Chat, Example, Task, Template

# the sides of a pair, by the sequence's number in its group
SIDES = ("chosen", "rejected")
# how many pairs are laid out together where a file is checked
AT_ONCE = 64


class Preferences:
    """A task whose training examples are the pairs of a file; all else is the task's own.

    path: JSON lines. A pair's reward is 1 for the chosen completion and 0 for the rejected one, whatever
    their texts, so that the advantage over the group's mean is +-0.5. Asked for the pairs, it raises
    InputError, naming file and line, where the file or a line can't be used.
    """

    def __init__(self, task: Task, path: str) -> None:
        self.task = task
        self.path = Path(path)
        self.name = task.name
        self.parser = task.parser
        self.shots = task.shots
        self.workers = task.workers
        self._pairs: list[Example] = []

    def examples(self, split: str) -> Sequence[Example]:
        """Return the pairs for `train`, the task's own examples for other splits."""
        if split != "train":
            return self.task.examples(split)
        self._pairs = self._pairs or self._read()
        return self._pairs

    def prompt(self, example: Example) -> str | Chat:
        """Return the prompt that a pair was recorded with; that of the task for its own examples."""
        prompt: str | Chat = example["prompt"] if _is_pair(example) else self.task.prompt(example)
        return prompt

    def template(self, example: Example) -> Template | None:
        """Return the task's template; for a pair, that of its `example`, None where it has none."""
        if not _is_pair(example):
            return self.task.template(example)
        return None if example["example"] is None else self.task.template(example["example"])

    def demonstrations(self) -> Sequence[Example]:
        """Return the task's own."""
        return self.task.demonstrations()

    def target(self, example: Example) -> str:
        """Return the task's own."""
        return self.task.target(example)

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return 1 for a chosen completion, 0 for a rejected one; `Recorded` notes which it is."""
        if not _is_pair(example):
            return self.task.reward(example, completion)
        return {"preferred": float(example["side"] == SIDES[0])}

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the task's own."""
        return self.task.answer(example, completion)

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return the task's own."""
        return self.task.measure(example, completion)

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the task's own."""
        return self.task.example_of(record)

    def check(self, policy: Policy, recorded: Recorded) -> None:
        """Raise InputError, naming file and line, for the first pair that the model can't be given."""
        pairs = self.examples("train")
        for at in range(0, len(pairs), AT_ONCE):
            try:
                self._try(policy, recorded, pairs[at : at + AT_ONCE])
            except InputError:
                for pair in pairs[at : at + AT_ONCE]:
                    try:
                        self._try(policy, recorded, [pair])
                    except InputError as error:
                        raise InputError(f"{self.path}, line {pair['line']}: {error}") from error
                raise

    def _try(self, policy: Policy, recorded: Recorded, pairs: Sequence[Example]) -> None:
        rollout(policy, recorded, self, pairs, len(SIDES), 0)

    def _read(self) -> list[Example]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"preferences.path={self.path} can't be read ({error}); give a jsonl file of pairs"
            ) from error
        pairs: list[Example] = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    pairs.append({"line": number, **self._pair(line)})
                except InputError as error:
                    raise InputError(f"{self.path}, line {number}: {error}") from error
        if not pairs:
            raise InputError(f"preferences.path={self.path} has no lines; give a file with a pair a line")
        return pairs

    def _pair(self, text: str) -> dict[str, Any]:
        """Return the pair of a line; raises InputError with what is missing."""
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"no JSON ({error}); expected an object a line") from error
        if not isinstance(line, dict):
            raise InputError("no object; expected an object a line")
        missing = [key for key in ("prompt", *SIDES) if key not in line]
        if missing:
            raise InputError(
                f"no {', no '.join(missing)}; a pair has prompt, chosen and rejected, the line has "
                f"{', '.join(line) or 'nothing'}"
            )
        prompt = line["prompt"]
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise InputError(
                "`prompt` is neither a text nor a chat, which is a list of objects with the texts `role` and "
                "`content`; give one of the two"
            )
        for side in SIDES:
            if not isinstance(line[side], str):
                raise InputError(f"`{side}` is {json.dumps(line[side])[:80]}; expected the completion's text")
        if line["chosen"] == line["rejected"]:
            raise InputError("`chosen` and `rejected` are the same text, which prefers nothing; leave it out")
        example = None
        if line.get("example") is not None:
            example = dict(self.task.example_of(line))
        elif self.task.template(self.task.examples("validation")[0]) is not None:
            raise InputError(
                f"no example; {self.name} asks with a template, which follows from the task's own `example`"
            )
        ids = {key: line[key] for key in map(_tokens_key, SIDES) if line.get(key) is not None}
        for key, value in ids.items():
            if not isinstance(value, list) or not all(type(token) is int for token in value):
                raise InputError(f"`{key}` is no list of whole numbers; leave it out, or give token ids")
        return (
            {"prompt": prompt, "chosen": line["chosen"], "rejected": line["rejected"]}
            | ids
            | {"example": example}
        )


class Recorded(Decoder):
    """Stands where a decoder stands, and gives each sequence its recorded completion.

    gen_length: completion tokens T. Of a group of two, the sequence of even number gets the chosen
    completion, the other one the rejected; EOS follows it to the end, and given tokens of a template stay. A
    completion of all T tokens has no EOS, as one that was cut off. No decoding step committed any of its
    tokens. Called, it raises InputError where a completion is longer, does not fit its template, or holds
    EOS or [MASK].
    """

    def __init__(self, gen_length: int) -> None:
        super().__init__(gen_length, block_size=gen_length, steps=1)

    def __call__(self, policy: Policy, prompts: Prompts, seed: int | None = None) -> Rollout:
        """Return B recorded completions; `seed` changes nothing."""
        sides = [SIDES[number % len(SIDES)] for number in prompts.index.tolist()]
        rows = [
            self._lay_out(policy, example, side, template, given)
            for example, side, template, given in zip(
                prompts.examples, sides, prompts.template.tolist(), prompts.given.tolist(), strict=True
            )
        ]
        completion = torch.tensor(rows, dtype=torch.long, device=prompts.ids.device)
        mask = through_first(completion == policy.eos_id)
        return Rollout.of_completions(
            prompts,
            completion,
            mask,
            tuple(policy.text(row) for row in completion),
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
        # what a template gives behind an end that the model wrote into a hole stays there
        return [t if fixed else own for own, t, fixed in zip(ids + rest, template, given, strict=True)]


def tokens_of(policy: Policy, pair: Example, side: str) -> list[int]:
    """Return the token ids of one side of a pair, up to its end: the recorded ones, or those of its text.

    Recorded ones that do not read as the text are another tokenizer's, or the text was changed since.
    """
    ids: list[int] | None = pair.get(_tokens_key(side))
    known = ids is not None and all(0 <= token < len(policy.tokenizer) for token in ids)
    if ids is not None and known and policy.tokenizer.decode(ids, skip_special_tokens=True) == pair[side]:
        return ids
    return policy.encode(pair[side])


def _tokens_key(side: str) -> str:
    return f"{side}_tokens"


def _is_pair(example: Example) -> bool:
    return all(key in example for key in SIDES)


def _is_chat(prompt: Any) -> bool:
    if not isinstance(prompt, list) or not prompt:
        return False
    texts = [
        message.get(key) for message in prompt if isinstance(message, dict) for key in ("role", "content")
    ]
    return len(texts) == 2 * len(prompt) and all(isinstance(text, str) for text in texts)


def make_pairs(
    policy: Policy,
    decoder: Decoder,
    task: Task,
    examples: Sequence[Example],
    samples: int,
    batch_size: int,
    seed: int,
) -> Iterator[list[dict[str, Any] | None]]:
    """Yield, a batch of examples at a time, their pairs as a file has them, None where all rewards are equal.

    Each example is completed `samples` times; the best completion is preferred to the worst, the first of
    equally good ones. batch_size: completions decoded together, at least one example's; it changes no draw.
    A line also has the two rewards.
    """
    count = max(1, batch_size // samples)
    for at in range(0, len(examples), count):
        batch = examples[at : at + count]
        done = rollout(policy, decoder, task, batch, samples, derive_seed(seed, "pairs"), at)
        parts = scored(task.reward, done.examples, done.texts, task.workers)
        rewards = [sum(part.values()) for part in parts]
        yield [
            _pair_of(policy, task, example, done, rewards, slice(n * samples, (n + 1) * samples))
            for n, example in enumerate(batch)
        ]


def _pair_of(
    policy: Policy, task: Task, example: Example, done: Rollout, rewards: list[float], group: slice
) -> dict[str, Any] | None:
    """Return the pair of the completions in the rows `group`, None where none is better than another."""
    rows = range(group.start, group.stop)
    best, worst = max(rows, key=rewards.__getitem__), min(rows, key=rewards.__getitem__)
    if rewards[best] == rewards[worst]:
        return None
    line: dict[str, Any] = {"prompt": task.prompt(example)}
    for side, row in zip(SIDES, (best, worst), strict=True):
        text = done.texts[row]
        line[side] = text
        ids = _up_to_end(done.completion_ids[row], policy.eos_id)
        if not _reads_as(policy, text, ids):
            line[_tokens_key(side)] = ids
        line[f"{side}_reward"] = rewards[row]
    return line | {"example": dict(example)}


def _up_to_end(completion_ids: Tensor, eos_id: int) -> list[int]:
    ids: list[int] = completion_ids.tolist()
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _reads_as(policy: Policy, text: str, ids: list[int]) -> bool:
    """Return whether the model's tokenizer reads a text as these tokens."""
    try:
        return policy.encode(text) == ids
    except InputError:
        return False
