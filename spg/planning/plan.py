"""From the measured parts of a run to a plan: does it fit, how long does it take, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import DictConfig

from spg.config import build
from spg.planning.hardware import GIB, Assumptions, Hardware
from spg.planning.measure import STEP_BYTES, Held, Measure, Part
from spg.planning.phantom import Work
from spg.planning.stand_ins import Prompting, prompting

# evaluations of a half beside those of trainer.validate_every: validation before the first update, and the
# test half with the first, the best and the last weights
OTHER_EVALUATIONS = 4


@dataclass(frozen=True)
class Phase:
    """A part of a run in one process.

    Attributes:
        name: What happens.
        bytes: Memory that is needed, with what is always held.
        work: Its operations.
        seconds: Their estimated time.
        times: How often it happens in the run.
    """

    name: str
    bytes: float
    work: Work
    seconds: float
    times: int


@dataclass(frozen=True)
class Plan:
    """What one process of a run takes.

    Attributes:
        hardware: Where it runs.
        processes: How many there are.
        held: What is always held, in bytes.
        phases: The parts of the run.
        prompt_tokens: Tokens of the longest prompt.
        measured: Whether prompts were measured.
        sequences: Completions of a rollout in one process.
        masked: Masked sequences of an update in one process.
        micro_batch_size: Masked sequences at once, as configured.
        largest_micro_batch: The most masked sequences at once that fit, without and with recomputed layers; 0
            if not even one fits.
        advice: What to change.
    """

    hardware: Hardware
    processes: int
    held: Held
    phases: list[Phase]
    prompt_tokens: int
    measured: bool
    sequences: int
    masked: int
    micro_batch_size: int | None
    largest_micro_batch: dict[bool, int] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Estimated time of the whole run."""
        return sum(phase.seconds * phase.times for phase in self.phases)

    @property
    def peak(self) -> float:
        """The most bytes that are needed."""
        return max(phase.bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.peak <= self.hardware.memory

    def record(self) -> dict[str, Any]:
        """Return the plan for a JSON file."""
        parts = asdict(self)
        largest = parts.pop("largest_micro_batch")
        parts["largest_micro_batch"] = {
            "checkpointing" if recomputed else "no checkpointing": size
            for recomputed, size in largest.items()
        }
        totals = {"fits": self.fits, "peak_bytes": self.peak, "run_seconds": self.seconds}
        return {"estimate": True, **totals, **parts}


def make_plan(cfg: DictConfig) -> Plan:
    """Plan a run.

    Args:
        cfg: Configuration of the plan.
    """
    return Planner(cfg, build(cfg.hardware), build(cfg.assumptions), prompting(cfg)).plan()


class Planner:
    """Measures the parts of a run and judges them.

    Args:
        cfg: Configuration of the plan.
        hardware: Where the run is to be.
        assumptions: What is assumed.
        prompts: Its prompts.
    """

    def __init__(
        self, cfg: DictConfig, hardware: Hardware, assumptions: Assumptions, prompts: Prompting
    ) -> None:
        self.cfg = cfg
        self.hardware = hardware
        self.assumptions = assumptions
        self.prompts = prompts
        self.measure = Measure(cfg, hardware, assumptions, prompts)
        self.held = self.measure.held()
        rollout, self.experience = self.measure.rollout()
        self.rollout = Part() if cfg.get("preferences") is not None else rollout
        self.batch = self.measure.batch(self.experience)
        self.micro = cfg.trainer.micro_batch_size
        self.update, self.before = self.measure.update(self.batch, self.micro)

    @property
    def masked(self) -> int:
        """Masked sequences of an update in this process."""
        return int(self.batch.samples.scored.any(-1).sum())

    def needed(self, part: Part, gradients: bool) -> float:
        """Return the memory that a part needs, with what is always held."""
        held = self.held.always + (self.held.gradients if gradients else 0)
        return held + part.bytes * (1 + self.assumptions.fragments) + self.assumptions.context_gib * GIB

    def plan(self) -> Plan:
        """Return the plan."""
        cfg, trainer = self.cfg, self.cfg.trainer
        rollouts = -(-trainer.max_updates // cfg.mu)
        evaluations = trainer.max_updates // trainer.validate_every + OTHER_EVALUATIONS
        completions = -(-(self.prompts.held_out or trainer.eval_batch_size) // self.measure.processes)
        evaluated = self.measure.evaluation(min(completions, trainer.eval_batch_size))
        batches = -(-completions // trainer.eval_batch_size)
        others = self.before.work.operations > 0
        # sliced gradients are not part of what an update makes
        update = self.needed(self.update, gradients=self.measure.sliced)
        phases = [
            self._phase("rollout", self.rollout, self.needed(self.rollout, True), rollouts),
            *(
                [self._phase("other policies", self.before, self.needed(self.before, True), rollouts)]
                if others
                else []
            ),
            self._phase("update", self.update, update, trainer.max_updates, self._exchange()),
            self._phase("evaluation", evaluated, self.needed(evaluated, True), evaluations, batches=batches),
        ]
        plan = Plan(
            hardware=self.hardware,
            processes=self.measure.processes,
            held=self.held,
            phases=phases,
            prompt_tokens=self.prompts.tokens,
            measured=self.prompts.measured,
            sequences=self.measure.prompts * cfg.group_size,
            masked=self.masked,
            micro_batch_size=self.micro,
        )
        own = bool(self.measure.policy.network.checkpointing)
        for recomputed in (False, True):
            if recomputed and plan.fits and not own:
                break  # nothing is gained
            plan.largest_micro_batch[recomputed] = self.largest(recomputed)
        return plan

    def _phase(
        self, name: str, part: Part, needed: float, times: int, more: float = 0.0, batches: int = 1
    ) -> Phase:
        return Phase(name, needed, part.work, batches * part.work.seconds + more, times)

    def _exchange(self) -> float:
        """Return the seconds of the optimizer's step, and of what processes exchange in an update."""
        measure = self.measure
        share = measure.trained / (measure.processes if measure.sliced else 1)
        bandwidth = self.hardware.bandwidth_gb_s * 1e9 * self.assumptions.bandwidth
        step = STEP_BYTES * share / bandwidth
        if measure.processes == 1:
            return step
        # a sum over processes sends everything twice; slices are also gathered, in the computation's type
        pieces = 1 if not measure.sliced or not self.micro else -(-self.masked // self.micro)
        sent = (4 * pieces + 2) * measure.trained if measure.sliced else 2 * 4 * measure.trained
        return step + sent / (self.hardware.link_gb_s * 1e9 * self.assumptions.bandwidth)

    def largest(self, recomputed: bool) -> int:
        """Return the most masked sequences at once with which an update fits; 0 if one is too many.

        Args:
            recomputed: Whether layers are computed again in the backward pass.
        """
        network = self.measure.policy.network
        before, network.checkpointing = network.checkpointing, recomputed
        try:
            return largest_that_fits(self._fits, self.masked)
        finally:
            network.checkpointing = before

    def _fits(self, size: int) -> float:
        """Return the share of the memory that an update in pieces of `size` needs."""
        part = Part(self.measure.pass_alone(self.batch, size))
        return self.needed(part, gradients=self.measure.sliced) / self.hardware.memory


def largest_that_fits(share: Callable[[int], float], most: int) -> int:
    """Return the largest size, up to `most`, that needs no more than a share of 1; 0 if there is none.

    The share grows about evenly with the size, so that few are tried.

    Args:
        share: Returns what a size needs.
        most: The largest size.
    """
    of_high = share(most)
    if of_high <= 1:
        return most
    low, of_low = 1, share(1)
    if of_low > 1 or most <= 2:
        return int(of_low <= 1)
    high = most
    for _ in range(3):
        guess = int(low + (high - low) * (1 - of_low) / (of_high - of_low))
        guess = max(low, min(guess, high - 1))
        if guess == low:
            break
        needed = share(guess)
        if needed <= 1:
            low, of_low = guess, needed
        else:
            high, of_high = guess, needed
    return low
