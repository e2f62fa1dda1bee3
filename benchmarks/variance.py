"""How much correlated mask draws lower the variance of the bounds and of their gradient.

`python -m benchmarks.variance` takes completions with a negative advantage from the first rollout of a
default run, for the shipped base models of Sudoku and Countdown, masks them many times in each way (`draws`
of `masking=block_random`) with each number of draws m, and compares mean and variance over the masks of the
ELBO, of the EUBO, and of the gradient of the loss that negative traces have (the mixture; the trace of its
covariance). Variances are multiplied by the number of masked sequences that need a forward pass, and divided
by those of independent draws with the same m: below 1 is better. Ranges are 95% intervals by a bootstrap over
the repeats.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, numbers, run, versions, write
from spg import config
from spg.algorithms.estimators import ELBO, EUBO, Mixture
from spg.algorithms.masking import BlockRandom
from spg.algorithms.masking.blockwise import Draws
from spg.core.seeding import Streams, derive_seed
from spg.core.types import MaskedSamples, Rollout
from spg.rollout.collect import collect
from spg.training.assembly import build_module
from spg.training.module import Training


class SharedBlock(BlockRandom):
    """Both draws of a pair take the same block."""

    @property
    def sharing(self) -> int:
        """Number of draws that share a block."""
        return 2


class AllStrata(BlockRandom):
    """Shares fall one into each of M strata, whichever blocks they are of."""

    def _shares(self, picked: Tensor, streams: Streams) -> Tensor:
        return super()._shares(torch.zeros_like(picked), streams)


WAYS: dict[str, tuple[type[BlockRandom], Draws]] = {
    "independent": (BlockRandom, "independent"),
    "antithetic": (BlockRandom, "antithetic"),
    "antithetic, one block a pair": (SharedBlock, "antithetic"),
    "stratified": (BlockRandom, "stratified"),
    "stratified, over all blocks": (AllStrata, "stratified"),
    "complementary": (BlockRandom, "complementary"),
}
FIGURES = ("elbo", "eubo", "gradient")


@dataclass(frozen=True)
class Measurement:
    """What R maskings of the same S sequences gave."""

    elbo: Tensor  # [R S]
    eubo: Tensor  # [R S]
    gradient: Tensor  # [R P] of the mean loss; P weights
    passes: float  # masked sequences of a completion that need a forward pass, on average


def negatives(module: Training, count: int) -> Rollout:
    """Return `count` completions with a negative advantage, of as many prompts as there are."""
    experience, _ = collect(
        module.policy,
        module.sampler,
        module.task,
        module.advantage,
        module.prompts.examples(0),
        module.group_size,
        derive_seed(module.seed, "rollout", 0),
    )
    group = experience.rollout.group.tolist()
    rows = [row for row, advantage in enumerate(experience.advantages.tolist()) if advantage < 0]
    first = {group[row]: row for row in reversed(rows)}
    chosen = sorted(sorted(rows, key=lambda row: (first[group[row]] != row, row))[:count])
    return experience.rollout.select(torch.tensor(chosen))


def logps_of(module: Training, rollout: Rollout, samples: MaskedSamples) -> Tensor:
    """Return log-probabilities [B M T]; draws that score nothing are not computed."""
    rows, draws = samples.scored.any(-1).nonzero(as_tuple=True)
    mask = None if bool(rollout.prompt_mask.all()) else rollout.attention_mask[rows]
    found = module.policy.token_logps(
        samples.tokens[rows, draws], mask, rollout.completion_ids[rows], samples.scored[rows, draws]
    )
    return torch.zeros(samples.scored.shape).index_put((rows, draws), found)


def measure(
    module: Training, rollout: Rollout, masking: BlockRandom, bounds: Sequence[Any], repeats: range, only: int
) -> Measurement:
    """Mask `rollout` once for each number of `repeats`; gradients are taken for the first `only` of them."""
    lower, upper, mixture = bounds
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    elbo, eubo, gradients, passes = [], [], [], 0
    for number in repeats:
        samples = masking(rollout, module.policy.mask_id, derive_seed(module.seed, "variance", number))
        passes += int(samples.scored.any(-1).sum())
        with torch.set_grad_enabled(number < only):
            logps = logps_of(module, rollout, samples)
            if number < only:
                loss = mixture(logps, samples).sum(-1).mean()
                gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        logps = logps.detach()
        elbo.append(lower(logps, samples).sum(-1))
        eubo.append(upper(logps, samples).sum(-1))
    scale = len(repeats) * len(rollout.texts)
    return Measurement(torch.stack(elbo), torch.stack(eubo), torch.stack(gradients), passes / scale)


def variances(found: Measurement) -> dict[str, Tensor]:
    """Return the squared distance of each masking's figures from their mean, [R] each; their sum over S."""
    return {
        name: (values - values.mean(0)).square().sum(-1) * len(values) / (len(values) - 1)
        for name in FIGURES
        for values in [getattr(found, name)]
    }


def interval(ours: Tensor, theirs: Tensor, scale: float, resamples: int = 2000) -> list[float]:
    """Return the 95% bootstrap interval of scale * mean(ours) / mean(theirs), of [R] and [R']."""
    g = torch.Generator().manual_seed(0)

    def means(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (resamples, len(values)), generator=g)].mean(-1)

    ratios = scale * means(ours) / means(theirs)
    return torch.quantile(ratios, torch.tensor([0.025, 0.975])).tolist()


def make_row(found: Measurement, against: Measurement) -> dict[str, Any]:
    """Return means, variances, and variances for the same work relative to `against`."""
    row: dict[str, Any] = {"passes": found.passes}
    work = found.passes / against.passes
    ours, theirs = variances(found), variances(against)
    for name in FIGURES:
        row[name] = {
            "variance": float(ours[name].mean()),
            "relative": work * float(ours[name].mean() / theirs[name].mean()),
            "interval": interval(ours[name], theirs[name], work),
        }
        if name != "gradient":
            values = getattr(found, name).mean(-1)
            row[name]["mean"] = float(values.mean())
            row[name]["mean_error"] = float(values.std() / len(values) ** 0.5)
    return row


def compare(task: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure all ways with all numbers of draws on a task's base model."""
    cfg = config.compose("config", [f"task={task}", "trainer.threads=1", f"seed={given.seed}"])
    module = build_module(cfg)
    module.policy.eval()
    rollout = negatives(module, given.sequences)
    bounds = ELBO(), EUBO(cfg.beta), Mixture(cfg.beta, cfg.omega)
    result: dict[str, Any] = {
        "settings": {name: cfg[name] for name in ("beta", "omega", "block_size", "gen_length")},
        "lengths": rollout.lengths.tolist(),
        "draws": {},
    }
    for m in given.draws:
        found = {
            name: measure(
                module,
                rollout,
                way(cfg.block_size, m, cfg.masking.prompt_mask_prob, draws=draws),
                bounds,
                range(given.repeats),
                given.gradients,
            )
            for name, (way, draws) in WAYS.items()
        }
        rows = {name: make_row(one, found["independent"]) for name, one in found.items()}
        result["draws"][str(m)] = rows
        sys.stdout.write(table(f"{task}, m={m}", rows))
        sys.stdout.flush()
    return result


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Return a table of relative variances, and of the bounds' means."""
    heads = ("passes", "ELBO", "EUBO", *(f"variance of {n}" for n in ("ELBO", "EUBO", "gradient")))
    lines = [f"{title:<30}" + "".join(f"{head:>22}" for head in heads)]
    for name, row in rows.items():
        cells = [f"{row['passes']:.2f}"]
        cells += [f"{row[b]['mean']:.4f} +- {row[b]['mean_error']:.4f}" for b in ("elbo", "eubo")]
        for figure in FIGURES:
            low, high = row[figure]["interval"]
            cells.append(f"{row[figure]['relative']:.2f} ({low:.2f}-{high:.2f})")
        lines.append(f"{name:<30}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print tables, and write the figures to a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="sudoku,countdown", help="tasks, with commas between them")
    parser.add_argument("--draws", type=numbers(int), default=[2, 4, 8, 16, 32], help="numbers of draws m")
    parser.add_argument("--sequences", type=int, default=4, help="completions that are masked")
    parser.add_argument("--repeats", type=int, default=360, help="maskings of each, for the bounds")
    parser.add_argument("--gradients", type=int, default=100, help="of those, with a gradient")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of rollouts and masks")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    if not 2 <= given.gradients <= given.repeats:
        parser.error(f"--gradients {given.gradients} must be from 2 to --repeats {given.repeats}")
    if given.sequences < 1:
        parser.error(f"--sequences {given.sequences} must be 1 or more")
    odd = [m for m in given.draws if m < 2 or m % 2]
    if odd:
        parser.error(f"--draws {odd[0]}: complementary pairs need even numbers")
    torch.set_num_threads(given.threads)
    started = time.perf_counter()
    result = {
        "benchmark": "variance",
        "machine": machine("cpu"),
        "versions": versions(),
        "settings": {name: value for name, value in vars(given).items() if name != "output"},
        "tasks": {task: compare(task, given) for task in given.tasks.split(",")},
        "seconds": time.perf_counter() - started,
    }
    write(result, given.output)


if __name__ == "__main__":
    run(main)
