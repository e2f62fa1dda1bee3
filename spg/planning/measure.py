"""What the parts of a run take: one rollout, one update and one evaluation, by running their own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from spg.config import build
from spg.config.settings import Optimization
from spg.core.examples import Example
from spg.core.types import Experience, MaskedSamples, UpdateBatch
from spg.planning.hardware import Assumptions, Hardware
from spg.planning.phantom import Ledger, Pretence, Work
from spg.planning.policy import Asked, Call, PlannedPolicy, fill_and_measure, planned_policy
from spg.planning.stand_ins import Prompting
from spg.rollout.collect import collect, complete
from spg.rollout.prompt_order import PromptStream
from spg.tasks.base import Task
from spg.training.module import Training

# bytes that AdamW reads and writes for each weight: weight, gradient and two moments, three of them written;
# before it, the norm of the gradient reads it, and clipping reads and writes it
STEP_BYTES = 28 + 12
FLOAT = 4


@dataclass(frozen=True)
class Part:
    """What a part of a run takes in one process.

    Attributes:
        bytes: The most bytes that it holds above what is always held.
        work: Its operations, and their least time.
        updates: For an update that learns in pieces: `work` is that of one with all pieces.
    """

    bytes: int = 0
    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Held:
    """Bytes that one process always holds.

    Attributes:
        weights: All weights, with the adapter.
        slices: This process's slices of the weights, if processes share them out.
        optimizer: The two moments of AdamW.
        gradients: Gradients, which are kept from an update to the next.
        exchange: Copies of gradients that processes exchange.
        reference: Copy of the model before training.
    """

    weights: int
    slices: int
    optimizer: int
    gradients: int
    exchange: int
    reference: int

    @property
    def always(self) -> int:
        """All but the gradients, which an update makes anew."""
        return self.weights + self.slices + self.optimizer + self.exchange + self.reference


class Measure:
    """Runs the parts of one process of a run on phantoms.

    Args:
        cfg: Configuration of the run.
        hardware: Where it is to run.
        assumptions: What is assumed.
        prompting: The prompts.
    """

    def __init__(
        self, cfg: DictConfig, hardware: Hardware, assumptions: Assumptions, prompting: Prompting
    ) -> None:
        self.cfg = cfg
        self.processes = int(cfg.trainer.devices) * int(cfg.trainer.get("nodes", 1))
        self.sliced = cfg.trainer.strategy == "fsdp"
        self.task: Task = prompting.task

        def seconds(operations: float, moved: float, dtype: torch.dtype) -> float:
            single = dtype in (torch.float32, torch.float64)
            return assumptions.seconds(hardware, operations, moved, single)

        self.ledger = Ledger(seconds)
        self.pretence = Pretence(hardware.device)
        with self.computing():
            self.policy = planned_policy(cfg, prompting.tokenizer, self.sliced)
            self.policy.ledger = self.ledger
            self.ledger.hold_all(self.policy)
            self.weights = self.ledger.live
            self.training = self._training()  # it may keep a copy of the model
            self.reference = self.ledger.live - self.weights
        if self.sliced:
            _let_go_of_gradients(self.policy)

    def _training(self) -> Training:
        cfg = self.cfg
        examples = self.task.examples("train")
        return Training(
            policy=self.policy,
            task=self.task,
            sampler=build(cfg.decoding),
            evaluator=build(cfg.decoding, temperature=0.0),
            advantage=build(cfg.advantage),
            masking=build(cfg.masking),
            objective=build(cfg.algorithm.objective),
            optimization=Optimization(**cfg.optimizer),
            prompts=PromptStream(examples, min(len(examples), self.prompts), 1, cfg.seed),
            mu=cfg.mu,
            group_size=cfg.group_size,
            max_updates=max(cfg.mu, 1),
            seed=cfg.seed,
            micro_batch_size=cfg.trainer.micro_batch_size,
            cut_completions=cfg.trainer.get("cut_completions", False),
            eval_batch_size=cfg.trainer.eval_batch_size,
        )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute on phantoms, and count."""
        with self.pretence, self.ledger:
            yield

    @property
    def prompts(self) -> int:
        """Prompts of a rollout that one process completes."""
        return max(1, int(self.cfg.trainer.prompts_per_rollout) // self.processes)

    @property
    def trained(self) -> int:
        """Number of weights that are trained."""
        return sum(p.numel() for p in self.policy.parameters() if p.requires_grad)

    def held(self) -> Held:
        """Return what one process always holds."""
        share = FLOAT * self.trained // (self.processes if self.sliced else 1)
        largest = max(sum(p.numel() for p in layer.parameters()) for layer in self.policy.network.layers)
        exchange = 0
        if self.sliced:
            exchange = 2 * FLOAT * largest  # a layer's gradients, whole, on their way and as they arrive
        elif self.processes > 1:
            exchange = share
        return Held(
            weights=self.weights,
            slices=share if self.sliced else 0,
            optimizer=2 * share,
            gradients=share,
            exchange=exchange,
            reference=self.reference,
        )

    def rollout(self) -> tuple[Part, Experience]:
        """Collect experience; no completion ends early."""
        rows = _cycle(self.task.examples("train"), self.prompts)
        self.policy.survey = []
        with self.computing():
            start = self.ledger.begin()
            t = self.training
            experience, _ = collect(
                self.policy, t.sampler, self.task, t.advantage, rows, t.group_size, seed=0
            )
            part = self._answer(start)
        return part, experience

    def evaluation(self, completions: int) -> Part:
        """Complete a batch of held-out examples greedily."""
        rows = _cycle(self.task.examples("validation"), completions)
        numbers = torch.arange(completions)
        self.policy.survey = []
        with self.computing():
            start = self.ledger.begin()
            with self.policy.decoding():
                complete(self.policy, self.training.evaluator, self.task, rows, numbers, numbers, seed=0)
            return self._answer(start)

    def _answer(self, start: int) -> Part:
        """Answer some of the questions of the survey; the work of the others lies between."""
        asked, self.policy.survey = self.policy.survey or [], None
        own, others = self.ledger.work, max((one.live for one in asked), default=start) - start
        most, total = self.ledger.peak - start, own
        families: dict[Call, list[Asked]] = {}
        for one in asked:
            families.setdefault(one.call.family, []).append(one)
        for family in families.values():
            found = {}
            for one in _corners(family):
                with self.policy.decoding():
                    found[one.call], held = fill_and_measure(self.policy, self.ledger, one)
                most = max(most, others + held)
            total = _add(total, _between(found, [one.call for one in family]))
        return Part(most, total)

    def batch(self, experience: Experience) -> UpdateBatch:
        """Return what the first update learns from, before other policies are asked."""
        t = self.training
        samples = t.masking.rounds(experience.rollout, self.policy.mask_id, [0] * t.mu)[0]
        return UpdateBatch.of(experience, samples)

    def update(self, batch: UpdateBatch, micro_batch_size: int | None) -> tuple[Part, Part]:
        """Take the gradient of an update, in as few pieces as show what all of them take.

        Args:
            batch: What the update learns from.
            micro_batch_size: Masked sequences in one pass; None for all.

        Returns:
            What the update takes, its gradients included; and what all updates of a rollout take beforehand,
            for other policies.
        """
        self.training.micro_batch_size = micro_batch_size
        few = _cut(batch, micro_batch_size)
        with self.computing():
            self.policy.survey = []
            start = self.ledger.begin()
            self.training.gradient.add(self.training.gradient.freeze(batch, policy_changes=True))
            small = self.ledger.peak - start
            asked, self.policy.survey = self.policy.survey, None
            rows = sum(one.call.rows for one in asked if one.call.learns)
            share = rows / max(1, _masked(self.training, few))
            frozen = [self._freeze(few, changes) for changes in (False, True)]
            t = self.training
            self.policy.train("old" not in t.objective.needs)
            ready = t.gradient.freeze(few, policy_changes=True)
            self.policy.zero_grad()
            start = self.ledger.begin()
            t.gradient.add(ready)
            most, work = self.ledger.peak - start, _scale(self.ledger.work, share)
            del ready
            self.policy.zero_grad()
        before = _add(frozen[0].work, _scale(frozen[1].work, t.mu - 1))
        held = max(part.bytes for part in frozen)
        return Part(most + small, work), Part(held + small, _scale(before, share))

    def pass_alone(self, batch: UpdateBatch, size: int) -> int:
        """Return the bytes of a pass over `size` masked sequences, with the gradients of one before it."""
        draws = min(size, batch.samples.scored.shape[1])
        few = _select_heaviest(batch, -(-size // draws), draws)
        self.training.micro_batch_size = None
        with self.computing():
            self.policy.train("old" not in self.training.objective.needs)
            ready = self.training.gradient.freeze(few, policy_changes=True)
            follows = size < _masked(self.training, batch) and not self.sliced
            if follows:  # so that gradients are there before
                self.training.gradient.add(ready)
            start = self.ledger.begin()
            self.training.gradient.add(ready)
            most = self.ledger.peak - start
            self.policy.zero_grad()
        return most + (FLOAT * self.trained if follows else 0)

    def _freeze(self, batch: UpdateBatch, policy_changes: bool) -> Part:
        start = self.ledger.begin()
        self.training.gradient.freeze(batch, policy_changes=policy_changes)
        return Part(self.ledger.peak - start, self.ledger.work)


def _let_go_of_gradients(policy: PlannedPolicy) -> None:
    """Drop each gradient as soon as it is there: sliced, it goes to its owner."""

    def let_go(parameter: Any) -> None:
        parameter.grad = None

    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(let_go)  # type: ignore[no-untyped-call]


def _cycle(rows: Sequence[Example], count: int) -> list[Example]:
    return [rows[number % len(rows)] for number in range(count)]


def _masked(training: Training, batch: UpdateBatch) -> int:
    """Return the number of masked sequences of a batch that are learned from."""
    learned = training.objective.learns_from(batch.experience)
    return int((learned.unsqueeze(-1) & batch.samples.scored.any(-1)).sum())


def _cut(batch: UpdateBatch, micro_batch_size: int | None) -> UpdateBatch:
    """Return a batch of few sequences that still has two pieces, the ones with most to score."""
    rows, draws = batch.samples.scored.shape[:2]
    if micro_batch_size is None or rows * draws <= 2 * micro_batch_size:
        return batch
    kept = min(draws, max(2, 2 * micro_batch_size))
    return _select_heaviest(batch, min(rows, max(2, -(-2 * micro_batch_size // kept))), kept)


def _select_heaviest(batch: UpdateBatch, count: int, draws: int) -> UpdateBatch:
    """Return `count` sequences with most to score, with the first `draws` of their masked samples.

    The rest of their groups comes along with nothing to score: objectives compare within a group.
    """
    samples = _fewer_draws(batch.samples, draws)
    group = batch.experience.rollout.group
    order: dict[int, None] = {}
    for row in samples.scored.sum((1, 2)).argsort(descending=True, stable=True).tolist():
        if len(order) >= count:
            break
        order.setdefault(row)
        for other in (group == group[row]).nonzero().flatten().tolist():
            order.setdefault(other)
    numbers = list(order)
    scored = samples.scored.clone()
    scored[numbers[count:]] = False
    index = torch.tensor(sorted(numbers))
    return UpdateBatch.of(batch.experience.select(index), replace(samples, scored=scored).select(index))


def _fewer_draws(samples: MaskedSamples, draws: int) -> MaskedSamples:
    names = ("tokens", "scored", "weight")
    return replace(samples, **{name: getattr(samples, name)[:, :draws] for name in names})


def _sizes(call: Call) -> tuple[float, float, float]:
    return (call.rows * call.positions, call.rows * call.positions * call.seen, call.chosen)


def _corners(family: Sequence[Asked]) -> list[Asked]:
    """Return few questions between which the others lie: the largest, the smallest, the most unlike."""
    sizes = np.array([[_sizes(one.call)[0], one.call.chosen] for one in family], dtype=float)
    sizes = sizes / np.maximum(1.0, sizes.max(axis=0))
    total, apart = sizes.sum(axis=1), sizes[:, 0] - sizes[:, 1]
    picked = {int(total.argmax()), int(total.argmin()), int(apart.argmax())}
    found: dict[Call, Asked] = {}
    for number in sorted(picked):
        found.setdefault(family[number].call, family[number])
    return list(found.values())


def _between(found: dict[Call, Work], calls: Sequence[Call]) -> Work:
    """Return the work of all calls, which grows evenly with their sizes between those that were measured."""

    def features(call: Call) -> list[float]:
        positions, _, chosen = _sizes(call)
        return [1.0, positions / scale[0], chosen / scale[1]]

    scale = [
        max(1.0, *(value for value in column))
        for column in zip(*((_sizes(call)[0], call.chosen) for call in calls), strict=True)
    ]
    known = np.array([features(call) for call in found])
    values = np.array([_numbers(work) for work in found.values()])
    slopes = np.linalg.lstsq(known, values, rcond=None)[0]
    total = (np.array([features(call) for call in calls]) @ slopes).sum(axis=0)
    return Work(*map(float, total))


def _numbers(work: Work) -> list[float]:
    return [work.operations, work.moved, work.kernels, work.seconds]


def _add(first: Work, second: Work) -> Work:
    return Work(*(a + b for a, b in zip(_numbers(first), _numbers(second), strict=True)))


def _scale(work: Work, factor: float) -> Work:
    return Work(*(factor * value for value in _numbers(work)))
