"""How noisy the mixture's gradient is at each omega, and which omega `omega=auto` would choose there.

`python -m benchmarks.omega` makes one rollout of a default Sudoku run, masks it afresh many times, and takes
the gradients of the negative traces' ELBO and EUBO each time. The trace of the variance over masks, and the
omega of least variance, follow for every omega; `omega=auto` sees successive sets of masks only, by its
stand-in for the gradient. With `--checkpoint` the same at a checkpoint of such a run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, numbers, run, versions, write
from spg import config
from spg.algorithms.estimators import Mixture, optimum, variance
from spg.algorithms.objectives.spg import SPG
from spg.core.seeding import derive_seed
from spg.core.types import Experience, UpdateBatch
from spg.models.weights import read_checkpoint
from spg.rollout.collect import collect
from spg.training.assembly import build_module
from spg.training.module import Training

OMEGAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def collect_rollout(module: Training, seed: int) -> Experience:
    """Return the module's first rollout, scored."""
    examples = module.prompts.examples(0)
    seed = derive_seed(seed, "rollout", 0)
    sampled = (module.policy, module.sampler, module.task, module.advantage, examples, module.group_size)
    return collect(*sampled, seed)[0]


def measure(num_mc: int, repeats: int, checkpoint: Path | None, seed: int) -> dict[str, Any]:
    """Return variances at OMEGAS, the best omega, and the adaptive one, at the base model or a checkpoint."""
    cfg = config.compose("config", ["omega=auto", f"num_mc={num_mc}", "trainer.threads=1", f"seed={seed}"])
    module = build_module(cfg)
    if checkpoint is not None:
        module.weights.load(read_checkpoint(checkpoint)["state_dict"])
    module.policy.train()
    experience = collect_rollout(module, seed)
    objective = module.objective
    assert isinstance(objective, SPG)
    mixture = objective.sandwich.negative
    assert isinstance(mixture, Mixture)
    adaptive = mixture.adaptive
    assert adaptive is not None
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    lengths, group = experience.rollout.lengths, experience.rollout.group
    weight = objective.coefficients(lengths, group) * experience.advantages
    weight = weight * (experience.advantages < 0)
    gradients: list[Tensor] = []
    for number in range(repeats):
        samples = module.masking(experience.rollout, module.policy.mask_id, derive_seed(seed, number))
        logps = torch.zeros(samples.scored.shape)
        batch = UpdateBatch.of(experience, samples)
        for piece in module.gradient.split(batch):
            logps = logps.index_put(piece.at, module.gradient.token_logps(batch, piece))
        both = []
        for bound in (mixture.lower, mixture.upper):
            value = (weight * bound(logps, samples).sum(-1)).sum()
            parts = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
            both.append(torch.cat([p.flatten() for p in parts if p is not None]))
        gradients.append(torch.stack(both))
        if number % module.mu == 0:
            adaptive.restore(adaptive.state())  # a rollout's first masks are compared with none before
        figures = adaptive.figures(logps, samples, experience.advantages, weight)
        adaptive.adapt({name: float(figure.mean()) for name, figure in figures.items()})
    stacked = torch.stack(gradients).double()
    centred = stacked - stacked.mean(0)
    cov = torch.einsum("rak,rbk->ab", centred, centred) / (repeats - 1)
    moments = (float(cov[0, 0]), float(cov[0, 1]), float(cov[1, 1]))
    return {
        "at": "base model" if checkpoint is None else "checkpoint",
        "update": 0 if checkpoint is None else read_checkpoint(checkpoint)["spg"]["updates"],
        "num_mc": num_mc,
        "variance": {str(omega): variance(omega, *moments) for omega in OMEGAS},
        "best omega": optimum(*moments),
        "adaptive omega": adaptive.value,
        "variance at the adaptive omega": variance(adaptive.value, *moments),
    }


def main() -> None:
    """Measure, show, and write the figures to a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=numbers(int), default=[2, 4], help="numbers of masked copies m")
    parser.add_argument("--repeats", type=int, default=80, help="sets of masks")
    parser.add_argument("--checkpoint", type=Path, help="measure this checkpoint of a Sudoku run, too")
    parser.add_argument("--seed", type=int, default=0, help="of rollout and masks")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    if given.repeats < 2 or min(given.draws) < 2:
        parser.error("--repeats and --draws must be 2 or more")
    torch.set_num_threads(1)
    started = time.perf_counter()
    places = [None] if given.checkpoint is None else [None, given.checkpoint]
    found = [measure(m, given.repeats, place, given.seed) for place in places for m in given.draws]
    result = {
        "benchmark": "omega",
        "machine": machine("cpu"),
        "versions": versions(),
        "settings": {"draws": given.draws, "repeats": given.repeats, "seed": given.seed},
        "measured": found,
        "seconds": time.perf_counter() - started,
    }
    for row in found:
        shown = ", ".join(f"{omega}: {value:.3g}" for omega, value in row["variance"].items())
        best, own = row["best omega"], row["adaptive omega"]
        sys.stdout.write(f"{row['at']}, m={row['num_mc']}: variance at omega {shown}\n")
        sys.stdout.write(f"  least at {best:.3f}; omega=auto: {own:.3f}\n")
    write(result, given.output)


if __name__ == "__main__":
    run(main)
