"""The training algorithm: rollout, rewards, advantages, masks, loss, optimizer step (paper, Algorithm 1).

Optimisation is manual. The module counts its own rollouts and updates (an update is an optimizer step), and
every random draw derives from (seed, rollout, inner update). Between rollouts only weights, optimizer and
counters are alive, so a checkpoint holds everything there. Several processes share the prompts of a
rollout; a group never spans two of them, and the update is that of one process with all prompts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim.lr_scheduler import LambdaLR

from spg.algorithms.advantages import Advantage
from spg.algorithms.masking import MaskingStrategy
from spg.algorithms.objectives import Adaptive, Objective
from spg.config.settings import GroupSize, Optimization
from spg.core.examples import Example
from spg.core.rules import Count, Seed, checked
from spg.core.seeding import derive_seed
from spg.core.types import Experience, MaskedSamples, UpdateBatch
from spg.evaluation.completer import Completer
from spg.evaluation.evaluator import Evaluation, evaluate
from spg.models.policy import Policy
from spg.rollout.collect import collect
from spg.rollout.decoder import Decoder
from spg.rollout.prompt_order import PromptStream
from spg.tasks.base import Task
from spg.training.checkpoint import ResumableModule
from spg.training.metrics import rollout_metrics, update_metrics
from spg.training.nonfinite import NonFiniteError, non_finite_error
from spg.training.optimizer import clip_gradients, make_optimizer
from spg.training.update import BackwardPasses, ExactGradient, truncate_to_learned


class Training(ResumableModule):
    """Improves a policy on a task by reinforcement learning.

    Args:
        policy: The model that is trained.
        task: Asks questions and scores completions.
        sampler: Decodes rollouts.
        evaluator: Decodes held-out completions.
        advantage: Turns rewards into advantages.
        masking: Makes masked copies of completions.
        objective: Turns log-probabilities of the masked copies into a loss.
        optimization: Numbers of the optimizer.
        prompts: The examples of each rollout, shared by the processes.
        mu: Inner updates on each rollout.
        group_size: Completions of each prompt.
        max_updates: Ends the run, if necessary in the middle of a rollout's updates.
        seed: All random draws derive from it.
        micro_batch_size: Masked sequences (completions x draws) in one forward pass; None for all of them.
            It changes no gradient.
        cut_completions: Leave out positions after the last one that may be scored in any sequence that is
            learned from. The policy sees them, masked, while it decodes, so this changes the loss.
        eval_batch_size: Held-out completions that are decoded at once.
        identity: Settings that a checkpoint must share with the run that it is loaded into.
    """

    @checked
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
        mu: Count,
        group_size: GroupSize,
        max_updates: Count,
        seed: Seed,
        micro_batch_size: Count | None = None,
        cut_completions: bool = False,
        eval_batch_size: Count = 256,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(identity or {}, objective, max_updates)
        self.automatic_optimization = False
        self.policy = policy
        self.task = task
        self.sampler = sampler
        self.evaluator = evaluator
        self.advantage = advantage
        self.masking = masking
        self.optimization = optimization
        self.prompts = prompts
        self.mu = mu
        self.group_size = group_size
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.cut_completions = cut_completions
        self.eval_batch_size = eval_batch_size
        self.experience: Experience | None = None  # of the rollout just learned from
        self.seconds |= {"rollout": 0.0, "reward": 0.0, "update": 0.0, "evaluation": 0.0}
        if "reference" in objective.needs:
            policy.keep_reference()

    def remaining_prompts(self) -> Iterator[list[Example]]:
        """Yield the prompts of each rollout that is left to do."""
        rollouts = -(-(self.max_updates - self.updates) // self.mu)
        for number in range(self.rollouts, self.rollouts + rollouts):
            yield self.prompts.examples(number)

    def training_step(self, prompts: Sequence[Example], batch_idx: int) -> None:
        """Learn from one rollout (paper, Algorithm 1)."""
        experience = self.collect(prompts)
        started = time.perf_counter()
        batches = self.prepare_batches(experience)
        preparation = (time.perf_counter() - started) / len(batches)
        for inner, batch in enumerate(batches):
            torch.manual_seed(derive_seed(self.seed, "dropout", self.rollouts, inner, self.global_rank))
            started = time.perf_counter()
            metrics = self.update(batch)
            metrics["time/update"] = preparation + time.perf_counter() - started
            self.seconds["update"] += metrics["time/update"]
            self.updates += 1
            self.record(metrics, self.updates)
        self.rollouts += 1
        self.experience = experience

    def collect(self, prompts: Sequence[Example]) -> Experience:
        """Let the policy complete the prompts, and score its completions."""
        seed = derive_seed(self.seed, "rollout", self.rollouts)
        experience, timing = collect(
            self.policy, self.sampler, self.task, self.advantage, prompts, self.group_size, seed, self.world
        )
        metrics = rollout_metrics(experience, timing, self.group_size, self.policy.eos_id, self.world)
        self.seconds["rollout"] += timing.rollout
        self.seconds["reward"] += timing.reward
        if not math.isfinite(metrics["reward"]):
            raise self.describe_failure("reward", experience)
        self.record(metrics, self.updates + 1)
        return experience

    def prepare_batches(self, experience: Experience) -> list[UpdateBatch]:
        """Return what each inner update learns from: fresh masks, and what the objective compares with."""
        seeds = [derive_seed(self.seed, "masks", self.rollouts, inner) for inner in range(self.mu)]
        rounds = self.masking.rounds(experience.rollout, self.policy.mask_id, seeds)
        left = self.max_updates - self.updates
        return [self.prepare_batch(experience, samples, k) for k, samples in enumerate(rounds[:left])]

    def prepare_batch(self, experience: Experience, samples: MaskedSamples, inner: int = 0) -> UpdateBatch:
        """Return what inner update number `inner` learns from, before the policy changes."""
        if self.cut_completions:
            experience, samples = truncate_to_learned(experience, samples, self.objective, self.world)
        batch = UpdateBatch.of(experience, samples, world=self.world)
        return self.gradient.freeze(batch, policy_changes=inner > 0)

    def update(self, batch: UpdateBatch) -> dict[str, float]:
        """Take one optimizer step, and return its metrics.

        Raises:
            NonFiniteError: before the step, if the loss or a gradient is not a finite number.
        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(scheduler, LambdaLR)
        # a ratio to what the policy was would measure the dropout's noise
        self.policy.train("old" not in self.objective.needs)
        optimizer.zero_grad()
        result = self.gradient.add(batch, BackwardPasses.of(self, self.world))
        norm = clip_gradients(self.weights.with_gradients(optimizer), self.optimization.max_grad_norm)
        learned = self.objective.learns_from(batch.experience)
        means, whole = update_metrics(result, batch, learned, norm, self.world)
        for name, key in (("loss", "loss"), ("gradient", "grad_norm")):
            if not math.isfinite(whole[key]):
                raise self.describe_failure(name, batch.experience, batch)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        if isinstance(self.objective, Adaptive):
            means = self.objective.adapt(means)
        return {"loss": whole.pop("loss"), **means, **whole, "lr": lr}

    def evaluate(self, split: str) -> Evaluation:
        """Decode and measure the completions of a split, each once, whatever the number of processes."""
        started = time.perf_counter()
        complete = Completer(self.policy, self.evaluator, self.task)
        examples = self.task.examples(split)
        result = evaluate(complete, self.task, examples, self.eval_batch_size, self.world)
        self.seconds["evaluation"] += time.perf_counter() - started
        return result

    @property
    def gradient(self) -> ExactGradient:
        """How the gradient of an update is computed."""
        return ExactGradient(self.policy, self.objective, self.micro_batch_size)

    def describe_failure(
        self, what: str, experience: Experience, batch: UpdateBatch | None = None
    ) -> NonFiniteError:
        """Return the error of a `what` that is not finite; every process must call this."""
        whole = {name.removeprefix("policy."): tensor for name, tensor in self.weights.whole().items()}
        number = self.updates + 1
        return non_finite_error(
            what, number, self.rollouts, experience, batch, self.gradient, whole, self.world
        )

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its warm-up."""
        optimizer, scheduler = make_optimizer(self.policy.parameters(), self.optimization)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the prompts as they are: the policy moves what it needs."""
        return batch
