"""The LightningModule: rollout, reward, advantage, masks, bounds, loss and update, in that order.

Optimisation is manual. The module counts its own rollouts and updates (an update is an optimizer
step); every random draw derives from (seed, rollout, inner update). Between rollouts nothing but
weights, optimizer and counters is alive, so that a checkpoint there is whole. Several processes share
the prompts of a rollout; a group never spans two of them, and the update is that of one process with
all prompts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from spg.algorithms.advantages import Advantage
from spg.algorithms.masking import MaskingStrategy
from spg.algorithms.objectives import Adaptive, Objective
from spg.config import updated
from spg.core.errors import RunError
from spg.core.limits import check_limits
from spg.core.seeding import derive_seed
from spg.core.types import Cohort, Experience, MaskedSamples
from spg.core.world import World
from spg.evaluation.completer import Completer
from spg.evaluation.evaluator import Evaluation, evaluate
from spg.models.policy import Policy
from spg.rollout.collect import Collected, collect
from spg.rollout.decoder import Decoder
from spg.rollout.prompt_order import PromptStream
from spg.tasks.base import Task
from spg.training.fsdp import Sharded


@dataclass(frozen=True)
class Optimization:
    """Numbers of the optimizer: AdamW, linear warm-up, then a constant learning rate.

    Raises ValueError where one is out of range.
    """

    lr: float
    betas: Sequence[float] = (0.9, 0.99)
    weight_decay: float = 0.1
    warmup_updates: int = 10
    max_grad_norm: float = 0.2

    def __post_init__(self) -> None:
        check_limits(**vars(self))


CHECKPOINT_FORMAT = 1


class NonFiniteError(RunError):
    """A loss, gradient or reward that is no number; `record` holds what is needed to see it again."""

    def __init__(self, text: str, record: dict[str, Any]) -> None:
        super().__init__(text)
        self.record = record


class Training(pl.LightningModule):
    """Improves a policy on a task by reinforcement learning.

    sampler decodes rollouts, evaluator held-out completions. prompts: the examples of each rollout,
    shared out among the processes. mu: inner updates on each rollout. micro_batch_size: masked
    sequences (completions x draws) in one forward pass; None for all; it changes no gradient.
    cut_completions: leave out what lies behind the last position that may be scored in any sequence that is
    learned from: masked positions, which a policy sees while it decodes, so that this is no exact saving.
    max_updates ends the run, if need be in the middle of a rollout's updates. identity: settings that
    a checkpoint must share with the run that it is loaded into.
    """

    def __init__(
        self,
        policy: Policy,
        task: Task,
        sampler: Decoder,
        evaluator: Decoder,
        advantage: Advantage,
        masking: MaskingStrategy,
        objective: Objective,
        optimization: Optimization,
        prompts: PromptStream,
        *,
        mu: int,
        group_size: int,
        max_updates: int,
        seed: int,
        micro_batch_size: int | None = None,
        cut_completions: bool = False,
        eval_batch_size: int = 256,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_limits(mu=mu, group_size=group_size, max_updates=max_updates, seed=seed)
        check_limits(micro_batch_size=micro_batch_size, eval_batch_size=eval_batch_size)
        check_limits(cut_completions=cut_completions)
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained; `on_load_checkpoint` checks that
        self.policy = policy
        self.task = task
        self.sampler = sampler
        self.evaluator = evaluator
        self.advantage = advantage
        self.masking = masking
        self.objective = objective
        self.optimization = optimization
        self.prompts = prompts
        self.mu = mu
        self.group_size = group_size
        self.max_updates = max_updates
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.cut_completions = cut_completions
        self.eval_batch_size = eval_batch_size
        self.identity = dict(identity or {})
        self.rollouts = 0  # rollouts done
        self.updates = 0  # optimizer steps done
        self.latest: dict[str, float] = {}  # last value of every metric
        self.experience: Experience | None = None  # of the rollout just learned from
        self.seconds = {"rollout": 0.0, "reward": 0.0, "update": 0.0, "evaluation": 0.0}
        self.started = time.perf_counter()
        self.earlier = 0.0  # seconds that the run took before it was resumed
        if "reference" in objective.needs:
            policy.keep_reference()

    @property
    def world(self) -> World:
        """The processes that share the run."""
        return World() if self._trainer is None else World(self.global_rank, self.trainer.world_size)

    def turns(self) -> Iterator[int]:
        """Yield the numbers of the rollouts that are left to do."""
        while self.updates < self.max_updates:
            yield self.rollouts

    def training_step(self, turn: int, batch_idx: int) -> None:
        """Learn from one rollout (paper, Algorithm 1)."""
        experience, timing = collect(
            self.policy,
            self.sampler,
            self.task,
            self.advantage,
            self.prompts.examples(self.rollouts),
            self.group_size,
            derive_seed(self.seed, "rollout", self.rollouts),
            self.world,
        )
        metrics = self._rollout_metrics(experience, timing)
        if not math.isfinite(metrics["reward"]):
            raise self._non_finite("reward", experience)
        self.record(metrics, self.updates + 1)
        started = time.perf_counter()
        seeds = [derive_seed(self.seed, "masks", self.rollouts, inner) for inner in range(self.mu)]
        draws = self.masking.rounds(experience.rollout, self.policy.mask_id, seeds)
        rounds = [self.cut(experience, samples) for samples in draws[: self.max_updates - self.updates]]
        old = [self.old_logps(*pair, inner) for inner, pair in enumerate(rounds)]
        before = (time.perf_counter() - started) / len(rounds)
        for inner, (seen, samples) in enumerate(rounds):
            torch.manual_seed(derive_seed(self.seed, "dropout", self.rollouts, inner, self.global_rank))
            started = time.perf_counter()
            metrics = self.update(seen, samples, old[inner])
            metrics["time/update"] = before + time.perf_counter() - started
            self.seconds["update"] += metrics["time/update"]
            self.updates += 1
            self.record(metrics, self.updates)
        self.rollouts += 1
        self.experience = experience
        if self.updates >= self.max_updates:  # Lightning has asked `turns` for the next one already
            self.trainer.should_stop = True

    def cut(self, experience: Experience, samples: MaskedSamples) -> tuple[Experience, MaskedSamples]:
        """Return both cut to the longest completion that is learned from, if `cut_completions` is set."""
        if not self.cut_completions:
            return experience, samples
        longest = self.longest(experience, samples)
        return replace(experience, rollout=experience.rollout.until(longest)), samples.until(longest)

    def old_logps(self, experience: Experience, samples: MaskedSamples, inner: int) -> Tensor | None:
        """Return log-probabilities [B M T] of the policy before the rollout's updates, without dropout.

        None where the objective does not need them, and for the first update, whose policy that is.
        """
        if "old" not in self.objective.needs or inner == 0:
            return None
        was_training = self.policy.training
        self.policy.eval()
        with torch.no_grad():
            logps = self.all_logps(experience, samples, self.pieces_of(experience, samples))
        self.policy.train(was_training)
        return logps

    def update(
        self, experience: Experience, samples: MaskedSamples, old: Tensor | None = None
    ) -> dict[str, float]:
        """Take one optimizer step on masked samples of an experience; return its metrics.

        old [B M T]: log-probabilities of the policy that made the rollout, None where it still is that one.
        Raises NonFiniteError, before the step, where the loss or a gradient is no finite number.
        """
        optimizer = self.optimizers()
        scheduler = self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(scheduler, LambdaLR)
        # a ratio to what the policy was would measure the dropout's noise
        self.policy.train("old" not in self.objective.needs)
        optimizer.zero_grad()
        loss, figures = self.backward_through(experience, samples, old)
        # where weights are sliced, gradients are with the slices, which the optimizer alone has by then
        own = self.policy.parameters() if self.sharded is None else _weights(optimizer)
        norm = self._clip([p for p in own if p.requires_grad])
        learned = self.objective.learns_from(experience)
        computed = (learned.unsqueeze(-1) & samples.scored.any(-1)).sum()
        # over all processes: the shares of the loss, sequences learned from, their masked copies, figures
        sums = torch.stack([loss, learned.sum(), computed, *((f * learned).sum() for f in figures.values())])
        total, count, copies, *rest = self.world.gather(sums.unsqueeze(0)).sum(0).tolist()
        for name, value in (("loss", total), ("gradient", float(norm))):
            if not math.isfinite(value):
                raise self._non_finite(name, experience, samples, old)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        means = {name: value / max(count, 1) for name, value in zip(figures, rest, strict=True)}
        if isinstance(self.objective, Adaptive):
            means = self.objective.adapt(means)
        copies /= max(count, 1)
        return {"loss": total, **means, "masked_copies": copies, "grad_norm": float(norm), "lr": lr}

    def longest(self, experience: Experience, samples: MaskedSamples) -> int:
        """Return how far the longest completion reaches that any process learns from, 1 or more."""
        region = samples.region & self.objective.learns_from(experience).unsqueeze(-1)
        reach = (torch.arange(1, region.shape[-1] + 1, device=region.device) * region).amax()
        return max(1, int(self.world.gather(reach.view(1)).max()))

    def backward_through(
        self, experience: Experience, samples: MaskedSamples, old: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the loss's gradient to the weights', in micro-batches that do not change it.

        Where the B x M masked sequences do not fit in one pass: (1) all log-probabilities, without
        gradient, piece by piece; (2) the loss on that small tensor and its gradient with respect to
        it; (3) each piece again, its backward pass starting from that gradient. The loss may thus
        join draws and sequences in any way (the EUBO's mean over draws stands inside its log).
        Sequences that the objective does not learn from are not computed. Gradients are summed over
        the processes in the last backward pass. Returns this process's share of the loss and the
        objective's figures [B].
        """
        pieces = self.pieces_of(experience, samples)
        cohort = self._cohort(experience, samples)
        reference = self.reference_logps(experience, samples, pieces)
        if len(pieces) <= 1:
            token_logps = torch.zeros(samples.scored.shape, device=samples.scored.device)
            for piece in pieces:
                token_logps = token_logps.index_put(piece, self._token_logps(experience, samples, piece))
            loss, figures = self.objective(token_logps, samples, experience, cohort, reference, old)
            self._backward(iter([loss] if pieces else []), len(pieces), experience, samples)
            return loss.detach(), figures

        states: list[Tensor] = []
        with torch.no_grad():
            frozen = self.all_logps(experience, samples, pieces, states)
        frozen.requires_grad_()
        loss, figures = self.objective(frozen, samples, experience, cohort, reference, old)
        (gradient,) = torch.autograd.grad(loss, frozen)
        after = _random_state(frozen.device)

        def again() -> Iterator[Tensor]:
            for piece, state in zip(pieces, states, strict=True):
                _set_random_state(state, frozen.device)  # the same dropout as in the first pass
                yield (self._token_logps(experience, samples, piece) * gradient[piece]).sum()

        self._backward(again(), len(pieces), experience, samples)
        _set_random_state(after, frozen.device)
        return loss.detach(), figures

    def reference_logps(
        self, experience: Experience, samples: MaskedSamples, pieces: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor | None:
        """Return the reference model's log-probabilities [B M T], None where the objective needs none."""
        if "reference" not in self.objective.needs:
            return None
        with self.policy.as_reference(), torch.no_grad():
            return self.all_logps(experience, samples, pieces)

    def _backward(
        self, losses: Iterator[Tensor], count: int, experience: Experience, samples: MaskedSamples
    ) -> None:
        """Run the backward passes of this process; the last one sums gradients over the processes.

        Where weights are sliced each of them does, so that every process makes as many as the others.
        """
        if self.world.size > 1:
            most = int(self.world.gather(torch.tensor([count], device=self.device)).max())
            if self.sharded is None:
                most = min(most, 1)  # the others wait for this process's gradients, once
            idle = max(0, most - count)
            losses = chain(losses, (self._nothing(experience, samples) for _ in range(idle)))
            count += idle
        for number, loss in enumerate(losses, start=1):
            with nullcontext() if number == count else self._unsynchronised():
                self.manual_backward(loss * self.world.size)  # ddp takes the mean

    def _nothing(self, experience: Experience, samples: MaskedSamples) -> Tensor:
        """Return a zero that depends on all weights: log-probabilities at one position, times 0."""
        rollout = experience.rollout
        scored = torch.zeros_like(samples.scored[:1, 0])
        scored[:, 0] = True
        mask = rollout.attention_mask[:1]
        tokens, targets = samples.tokens[:1, 0], rollout.completion_ids[:1]
        return self.policy.token_logps(tokens, mask, targets, scored).sum() * 0.0

    def _clip(self, parameters: Sequence[Tensor]) -> Tensor:
        """Scale the gradients down to `max_grad_norm`, if they are larger, and return their norm before."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.optimization.max_grad_norm, norm)
        return norm

    @property
    def sharded(self) -> Sharded | None:
        """The strategy that slices the weights, None where each process has all of them."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, Sharded) else None

    def _unsynchronised(self) -> AbstractContextManager[None]:
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _cohort(self, experience: Experience, samples: MaskedSamples) -> Cohort:
        return Cohort.of(experience, samples, self.world)

    def all_logps(
        self,
        experience: Experience,
        samples: MaskedSamples,
        pieces: Sequence[tuple[Tensor, Tensor]],
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Return log-probabilities [B M T], 0 outside `pieces`; `states` takes the random state of each."""
        logps = torch.zeros(samples.scored.shape, device=samples.scored.device)
        for piece in pieces:
            if states is not None:
                states.append(_random_state(logps.device))
            logps[piece] = self._token_logps(experience, samples, piece)
        return logps

    def pieces_of(self, experience: Experience, samples: MaskedSamples) -> list[tuple[Tensor, Tensor]]:
        """Cut the (sequence, draw) pairs to compute into pieces of at most micro_batch_size."""
        learned = self.objective.learns_from(experience).unsqueeze(-1) & samples.scored.any(-1)
        rows, draws = learned.nonzero(as_tuple=True)
        if len(rows) == 0:
            return []
        size = self.micro_batch_size or len(rows)
        return list(zip(torch.split(rows, size), torch.split(draws, size), strict=True))

    def _token_logps(
        self, experience: Experience, samples: MaskedSamples, piece: tuple[Tensor, Tensor]
    ) -> Tensor:
        rows, _ = piece
        rollout = experience.rollout
        tokens, mask = samples.tokens[piece], None
        if not bool(rollout.prompt_mask.all()):
            mask = rollout.attention_mask[rows]
            padding = int((~mask.any(0)).sum())  # on the left of every row of the piece, seen by none
            tokens, mask = tokens[:, padding:], mask[:, padding:]
            mask = None if bool(mask.all()) else mask
        return self.policy.token_logps(tokens, mask, rollout.completion_ids[rows], samples.scored[piece])

    def _rollout_metrics(self, experience: Experience, timing: Collected) -> dict[str, float]:
        self.seconds["rollout"] += timing.rollout
        self.seconds["reward"] += timing.reward
        rollout = experience.rollout
        # a template that ends in a given token is complete without EOS
        ended = (rollout.completion_ids == self.policy.eos_id).any(-1) | rollout.given[:, -1]
        own = {
            "reward": experience.rewards,
            "completions/mean_length": rollout.lengths,
            "completions/clipped_ratio": ~ended,
            **{f"rewards/{name}/mean": part for name, part in experience.reward_parts.items()},
        }
        if timing.logp_difference is not None:
            own["sampling/logp_difference"] = timing.logp_difference
        rows = self.world.gather(torch.stack([row.float() for row in own.values()], 1))
        means = dict(zip(own, rows.mean(0).tolist(), strict=True))
        spread = rows[:, 0].view(-1, self.group_size).std(-1)
        tokens = self.world.gather(torch.tensor([timing.tokens], device=self.device)).sum()
        return {
            **means,
            "reward_std": float(spread.mean()),
            "frac_reward_zero_std": float((spread == 0).float().mean()),
            "time/rollout": timing.rollout,
            "time/reward": timing.reward,
            "throughput/tokens_per_s": float(tokens) / timing.rollout,
        }

    def _non_finite(
        self,
        what: str,
        experience: Experience,
        samples: MaskedSamples | None = None,
        old: Tensor | None = None,
    ) -> NonFiniteError:
        """Return the error that names update and examples; every process must call it."""
        culprits = self.culprits(experience, samples, old)
        rollout = experience.rollout
        own = [(dict(rollout.examples[i]), rollout.texts[i], float(experience.rewards[i])) for i in culprits]
        named = self.world.gather_items(own)
        state = self.saved()  # every process, also those that keep nothing
        record = {
            "what": what,
            "update": self.updates + 1,
            "rollout": self.rollouts,
            "weights": {name.removeprefix("policy."): tensor for name, tensor in state.items()},
            "parts": self.world.gather_items(
                [
                    {
                        "experience": asdict(experience),
                        "samples": None if samples is None else asdict(samples),
                        "old": old,
                    }
                ]
            ),
            "culprits": named,
            "objective": self.objective.state() if isinstance(self.objective, Adaptive) else {},
        }
        listed = "\n".join(f"  {p}, completion {t!r}, reward {r}" for p, t, r in named[:5])
        more = f"\n  and {len(named) - 5} more" if len(named) > 5 else ""
        sick = [name for name, p in self.policy.named_parameters() if not bool(p.isfinite().all())]
        alone = f"the weights are not finite, first {sick[0]}" if sick else "no sequence shows it alone"
        found = f"sequences:\n{listed}{more}" if named else alone
        return NonFiniteError(
            f"the {what} of update {self.updates + 1} is not a finite number; {found}", record
        )

    def culprits(
        self, experience: Experience, samples: MaskedSamples | None, old: Tensor | None = None
    ) -> list[int]:
        """Return the rows whose reward, log-probabilities or gradient are not finite; old [B M T]."""
        bad = ~experience.rewards.isfinite()
        if samples is None or bool(bad.any()):
            return bad.nonzero().flatten().tolist()
        with torch.no_grad():
            logps = self.all_logps(experience, samples, self.pieces_of(experience, samples))
        bad = (~logps.isfinite() & samples.scored).any(2).any(1)
        if bool(bad.any()):
            return bad.nonzero().flatten().tolist()
        weights = [p for p in self.policy.parameters() if p.requires_grad]
        found = []
        group = experience.rollout.group
        for row in range(len(bad)):
            members = (group == group[row]).nonzero().flatten()  # an objective may compare them
            one, masked = experience.select(members), samples.select(members)
            pieces = self.pieces_of(one, masked)
            reference = self.reference_logps(one, masked, pieces)
            with torch.no_grad():
                logps = self.all_logps(one, masked, pieces)
            for rows, draws in pieces:
                own = members[rows] == row
                if bool(own.any()):
                    piece = rows[own], draws[own]
                    logps = logps.index_put(piece, self._token_logps(one, masked, piece))
            if logps.requires_grad:
                before = None if old is None else old[members]
                loss, _ = self.objective(logps, masked, one, None, reference, before)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                if not all(bool(g.isfinite().all()) for g in gradients if g is not None):
                    found.append(row)
        return found

    def record(self, metrics: dict[str, float], update: int) -> None:
        """Log metrics as belonging to optimizer step number `update`, from 1; 0 is before training."""
        self.latest.update(metrics)
        for logger in self.loggers:
            logger.log_metrics(metrics, step=update)

    def evaluate(self, split: str) -> Evaluation:
        """Decode and measure the completions of a split, each once, whatever the number of processes."""
        started = time.perf_counter()
        complete = Completer(self.policy, self.evaluator, self.task)
        examples = self.task.examples(split)
        result = evaluate(complete, self.task, examples, self.eval_batch_size, self.world)
        self.seconds["evaluation"] += time.perf_counter() - started
        return result

    def configure_optimizers(self) -> Any:
        """Return AdamW with the groups `decay` (matrices) and `no_decay`, and the warm-up."""
        numbers = self.optimization
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2]
        others = [p for p in trained if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": numbers.weight_decay, "name": "decay"},
                {"params": others, "weight_decay": 0.0, "name": "no_decay"},
            ],
            lr=numbers.lr,
            betas=(numbers.betas[0], numbers.betas[1]),
            fused=True,
        )
        warmup = numbers.warmup_updates
        scheduler = LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def elapsed(self) -> float:
        """Return the seconds that the run has taken, those before it was resumed included."""
        return self.earlier + time.perf_counter() - self.started

    def trained(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, by their names in the module's state."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def saved(self) -> dict[str, Tensor]:
        """Return the trained tensors on the CPU; whole and on the first process where weights are sliced.

        Every process must call it.
        """
        trained = self.trained()
        if self.sharded is not None:
            state = self.sharded.lightning_module_state_dict()
            return {name: tensor for name, tensor in state.items() if name in trained}
        return {name: tensor.detach().cpu() for name, tensor in trained.items()}

    def remembered(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors, where weights are sliced of this process's slices."""
        if self.sharded is not None:
            return self.sharded.slices()
        return {name: tensor.detach().clone() for name, tensor in self.trained().items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the trained tensors with whole ones, as a checkpoint has them, or with `remembered` ones.

        Raises RunError where they do not fit.
        """
        self._check_fit(tensors)
        if self.sharded is not None:
            self.sharded.fill(tensors)
        else:
            self.load_state_dict(tensors, strict=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and identity; keep the trained tensors and leave Lightning's loops out.

        The loops count batches of an epoch, which mean nothing here: rollouts count themselves.
        """
        del checkpoint["loops"]
        trained = self.trained()
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["spg"] = {
            "format": CHECKPOINT_FORMAT,
            "rollouts": self.rollouts,
            "updates": self.updates,
            "latest": dict(self.latest),
            "seconds": dict(self.seconds),
            "elapsed": self.elapsed(),
            "identity": self.identity,
        }
        if isinstance(self.objective, Adaptive):
            checkpoint["spg"]["objective"] = self.objective.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take counters back; raises RunError where the checkpoint is not one of this run."""
        own = checkpoint.get("spg")
        if not isinstance(own, dict) or own.get("format") != CHECKPOINT_FORMAT:
            raise RunError("the checkpoint was not written by this version of spg.train; give another")
        theirs = updated(own["identity"])
        for key in sorted(self.identity.keys() | theirs.keys()):
            before, now = theirs.get(key, "nothing"), self.identity.get(key, "nothing")
            if before != now:
                raise RunError(
                    f"the checkpoint belongs to a run with {key}={before}, this one has {key}={now}; "
                    "resume with the run's own settings, or start a new run"
                )
        self._check_fit(checkpoint["state_dict"])
        if own["updates"] > self.max_updates:
            raise RunError(
                f"the checkpoint has done {own['updates']} updates already, but trainer.max_updates="
                f"{self.max_updates}; give a higher number, or an earlier checkpoint"
            )
        self.rollouts, self.updates = own["rollouts"], own["updates"]
        self.latest, self.seconds = dict(own["latest"]), dict(own["seconds"])
        self.earlier = own["elapsed"]
        if isinstance(self.objective, Adaptive):
            self.objective.restore(own.get("objective", {}))  # none in checkpoints of version 0.3

    def _check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {name: tuple(t.shape) for name, t in self.trained().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if expected != found:
            name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise RunError(
                f"the checkpoint does not fit the model: {name} is {found.get(name, 'missing')} in it and "
                f"{expected.get(name, 'not trained')} here"
            )


def _weights(optimizer: LightningOptimizer) -> Iterator[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
