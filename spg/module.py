"""The LightningModule: rollout, reward, advantage, masks, bounds, loss and update, in that order.

Optimisation is manual. The module counts its own rollouts and updates (an update is an optimizer
step); every random draw derives from (seed, rollout, inner update). Between rollouts nothing but
weights, optimizer and counters is alive, so that a checkpoint there is whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from spg.advantages import Advantage
from spg.collect import Evaluation, Timing, collect, evaluate
from spg.decoding import Decoder
from spg.limits import check_limits
from spg.masking import MaskingStrategy
from spg.objectives import Objective
from spg.policy import Policy
from spg.seeding import derive_seed
from spg.tasks.base import Example, Task
from spg.types import Experience, MaskedSamples


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


class Training(pl.LightningModule):
    """Improves a policy on a task by reinforcement learning.

    sampler decodes rollouts, evaluator held-out completions. mu: inner updates on each rollout.
    micro_batch_size: masked sequences (completions x draws) in one forward pass; None for all; it
    changes no gradient. max_updates ends the run, if need be in the middle of a rollout's updates.
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
        *,
        mu: int,
        group_size: int,
        max_updates: int,
        seed: int,
        micro_batch_size: int | None = None,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__()
        check_limits(mu=mu, group_size=group_size, max_updates=max_updates, seed=seed)
        check_limits(micro_batch_size=micro_batch_size, eval_batch_size=eval_batch_size)
        self.automatic_optimization = False
        self.policy = policy
        self.task = task
        self.sampler = sampler
        self.evaluator = evaluator
        self.advantage = advantage
        self.masking = masking
        self.objective = objective
        self.optimization = optimization
        self.mu = mu
        self.group_size = group_size
        self.max_updates = max_updates
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.rollouts = 0  # rollouts done
        self.updates = 0  # optimizer steps done
        self.latest: dict[str, float] = {}  # last value of every metric
        self.experience: Experience | None = None  # of the rollout just learned from
        self.seconds = {"rollout": 0.0, "reward": 0.0, "update": 0.0, "evaluation": 0.0}

    def training_step(self, examples: Sequence[Example], batch_idx: int) -> None:
        """Learn from one rollout (paper, Algorithm 1)."""
        experience, timing = collect(
            self.policy,
            self.sampler,
            self.task,
            self.advantage,
            examples,
            self.group_size,
            derive_seed(self.seed, "rollout", self.rollouts),
        )
        self.record(self._rollout_metrics(experience, timing), self.updates + 1)
        for inner in range(min(self.mu, self.max_updates - self.updates)):
            seed = derive_seed(self.seed, "masks", self.rollouts, inner)
            samples = self.masking(experience.rollout, self.policy.mask_id, seed)
            started = time.perf_counter()
            metrics = self.update(experience, samples)
            metrics["time/update"] = time.perf_counter() - started
            self.seconds["update"] += metrics["time/update"]
            self.updates += 1
            self.record(metrics, self.updates)
        self.rollouts += 1
        self.experience = experience
        if self.updates >= self.max_updates:
            self.trainer.should_stop = True

    def update(self, experience: Experience, samples: MaskedSamples) -> dict[str, float]:
        """Take one optimizer step on masked samples of an experience; return its metrics."""
        optimizer = self.optimizers()
        scheduler = self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(scheduler, LambdaLR)
        self.policy.train()
        optimizer.zero_grad()
        loss, metrics = self.backward_through(experience, samples)
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimization.max_grad_norm)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        numbers = {name: float(value) for name, value in metrics.items()}
        return {"loss": float(loss), **numbers, "grad_norm": float(norm), "lr": lr}

    def backward_through(
        self, experience: Experience, samples: MaskedSamples
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the loss's gradient to the weights', in micro-batches that do not change it.

        Where the B x M masked sequences do not fit in one pass: (1) all log-probabilities, without
        gradient, piece by piece; (2) the loss on that small tensor and its gradient with respect to
        it; (3) each piece again, its backward pass starting from that gradient. The loss may thus
        join draws and sequences in any way (the EUBO's mean over draws stands inside its log).
        Sequences that the objective does not learn from are not computed.
        """
        pieces = self._pieces(experience, samples)
        shape = samples.scored.shape
        if len(pieces) <= 1:
            token_logps = torch.zeros(shape, device=samples.scored.device)
            for piece in pieces:
                token_logps = token_logps.index_put(piece, self._token_logps(experience, samples, piece))
            loss, metrics = self.objective(token_logps, samples, experience)
            if pieces:
                self.manual_backward(loss)
            return loss.detach(), metrics

        frozen = torch.zeros(shape, device=samples.scored.device)
        random_states = []
        with torch.no_grad():
            for piece in pieces:
                random_states.append(_random_state(frozen.device))
                frozen[piece] = self._token_logps(experience, samples, piece)
        frozen.requires_grad_()
        loss, metrics = self.objective(frozen, samples, experience)
        (gradient,) = torch.autograd.grad(loss, frozen)
        after = _random_state(frozen.device)
        for piece, state in zip(pieces, random_states, strict=True):
            _set_random_state(state, frozen.device)  # the same dropout as in the first pass
            self.manual_backward((self._token_logps(experience, samples, piece) * gradient[piece]).sum())
        _set_random_state(after, frozen.device)
        return loss.detach(), metrics

    def _pieces(self, experience: Experience, samples: MaskedSamples) -> list[tuple[Tensor, Tensor]]:
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
        mask = None
        if not bool(rollout.prompt_mask.all()):
            mask = rollout.attention_mask[rows]
        return self.policy.token_logps(
            samples.tokens[piece], mask, rollout.completion_ids[rows], samples.scored[piece]
        )

    def _rollout_metrics(self, experience: Experience, timing: Timing) -> dict[str, float]:
        self.seconds["rollout"] += timing.rollout
        self.seconds["reward"] += timing.reward
        spread = experience.rewards.view(-1, self.group_size).std(-1)
        rollout = experience.rollout
        # a template that ends in a given token is complete without EOS
        ended = (rollout.completion_ids == self.policy.eos_id).any(-1) | rollout.given[:, -1]
        return {
            "reward": float(experience.rewards.mean()),
            "reward_std": float(spread.mean()),
            **{f"rewards/{name}/mean": float(p.mean()) for name, p in experience.reward_parts.items()},
            "frac_reward_zero_std": float((spread == 0).float().mean()),
            "completions/mean_length": float(rollout.lengths.float().mean()),
            "completions/clipped_ratio": float((~ended).float().mean()),
            "time/rollout": timing.rollout,
            "time/reward": timing.reward,
            "throughput/tokens_per_s": timing.tokens / timing.rollout,
        }

    def record(self, metrics: dict[str, float], update: int) -> None:
        """Log metrics as belonging to optimizer step number `update`, from 1; 0 is before training."""
        self.latest.update(metrics)
        for logger in self.loggers:
            logger.log_metrics(metrics, step=update)

    def evaluate(self, split: str) -> Evaluation:
        """Decode and measure the completions of a split."""
        started = time.perf_counter()
        examples = self.task.examples(split)
        result = evaluate(self.policy, self.evaluator, self.task, examples, self.eval_batch_size)
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the module's own counters."""
        checkpoint["spg"] = {"rollouts": self.rollouts, "updates": self.updates}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the module's own counters back."""
        self.rollouts = checkpoint["spg"]["rollouts"]
        self.updates = checkpoint["spg"]["updates"]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
