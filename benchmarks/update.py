"""Time and memory of an update, compared with one done the plain way (benchmarks/plain.py).

`python -m benchmarks.update` takes the loss and its gradient (no optimizer step) on random completions with a
random LLaDA of 20 million parameters, its head frozen; with overrides of spg.train (`model=llada_8b
model.weights=random --device cuda`) with any other model. It checks first that losses and gradients agree.
Memory is the peak above what is held before the pass, gradients included: on CPU each figure is that of a
process of its own, on CUDA that of the allocator. Ours is also measured with other numbers of draws, in
micro-batches that do not change the gradient, of as many sequences as one draw has.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.common import (
    TOLERANCE,
    Sizes,
    best_rates,
    compare,
    floor,
    list_settings,
    machine,
    make_parser,
    make_policy,
    make_prompts,
    measure_seconds,
    numbers,
    parse,
    profile,
    rates,
    run,
    spread,
    table,
    trim,
    versions,
    write,
)
from spg.algorithms.advantages import GroupMean
from spg.algorithms.estimators import ELBO, Mixture, Sandwich
from spg.algorithms.masking import BlockRandom
from spg.algorithms.objectives.spg import SPG
from spg.config.settings import Optimization
from spg.core.errors import RunError
from spg.core.types import Experience, MaskedSamples
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder
from spg.rollout.prompt_order import PromptStream
from spg.tasks.sudoku import Sudoku
from spg.training.module import Training

BOTH = ("plain", "ours")
Peak = dict[str, float | str | None]


class Bench:
    """One group's update, done either way on the same masked samples."""

    def __init__(self, policy: Policy, given: argparse.Namespace) -> None:
        self.policy = policy
        self.given = given
        if not given.train_head:
            policy.network.head.requires_grad_(False)
        self.experience = make_experience(policy, given)
        task = Sudoku(train_size=8, eval_size=8)  # asked for nothing: only the update is run
        decoder = Decoder(given.tokens, given.block, given.tokens)
        self.training = Training(
            policy,
            task,
            decoder,
            decoder,
            GroupMean(),
            BlockRandom(given.block),
            SPG(Sandwich(ELBO(), Mixture(given.beta, given.omega))),
            Optimization(lr=1e-3),
            PromptStream(task.examples("train"), 1, 1, seed=0),
            mu=1,
            group_size=given.group,
            max_updates=1,
            seed=given.seed,
        )

    def samples(self, draws: int, seed: int) -> MaskedSamples:
        """Mask the completions `draws` times."""
        return BlockRandom(self.given.block, draws)(self.experience.rollout, self.policy.mask_id, seed)

    def plain(self, samples: MaskedSamples) -> Tensor:
        """Take the gradient the plain way; return the loss."""
        self.policy.zero_grad()
        loss = plain.loss(self.policy, self.experience, samples, self.given.beta, self.given.omega)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def ours(self, samples: MaskedSamples, micro_batch: int | None = None) -> Tensor:
        """Take the gradient as training does, in micro-batches if a size is given; return the loss."""
        self.policy.zero_grad()
        self.training.micro_batch_size = micro_batch
        return self.training.gradient.add(self.training.prepare_batch(self.experience, samples)).loss

    def gradient(self) -> Tensor:
        """Return the gradients of all that is trained, in one vector [P]."""
        every = (p.grad for p in self.policy.parameters())
        return torch.cat([g.detach().flatten().float() for g in every if g is not None])

    def ways(self) -> dict[str, tuple[int, Callable[[MaskedSamples], Tensor]]]:
        """Return what is measured: draws of each completion, and the pass over them."""
        pieces = partial(self.ours, micro_batch=self.given.group)
        more = {f"ours, m={m}, in pieces": (m, pieces) for m in self.given.more_draws}
        return {"plain": (self.given.draws, self.plain), "ours": (self.given.draws, self.ours), **more}


def make_experience(policy: Policy, given: argparse.Namespace) -> Experience:
    """Return completions of random tokens, none of them EOS, none without an advantage."""
    prompts = make_prompts(policy, given, distinct=False)
    completions = argparse.Namespace(**{**vars(given), "prompt": given.tokens, "seed": given.seed + 1})
    ids = make_prompts(policy, completions, distinct=True).ids
    # a decoder given all tokens has none to choose; to the update they are the policy's own
    whole = replace(prompts, template=ids, given=torch.ones_like(prompts.given))
    rollout = Decoder(given.tokens, given.block, given.tokens)(policy, whole)
    rollout = replace(rollout, given=prompts.given, group=prompts.group, index=prompts.index)
    # some of either sign, and a loss that is no difference of large numbers
    first = torch.arange(given.group, device=ids.device) < (given.group + 1) // 2
    advantages = torch.where(first, 1.0, -0.5)
    return Experience(rollout, advantages, {}, advantages)


def check(bench: Bench) -> dict[str, Any]:
    """Check that losses and gradients of both ways are equal, in one pass and in pieces; raises RunError."""
    samples = bench.samples(bench.given.draws, seed=0)
    expected = float(bench.plain(samples))
    wanted = bench.gradient()
    allowed = TOLERANCE[bench.policy.precision]
    found: dict[str, Any] = {"allowed": allowed}
    for name, micro_batch in (("one pass", None), ("in pieces", bench.given.group)):
        loss = float(bench.ours(samples, micro_batch))
        apart = bench.gradient() - wanted
        errors = {
            "loss": abs(loss - expected) / abs(expected),
            "gradient": float(apart.norm() / wanted.norm()),
        }
        for what, error in errors.items():
            if not error <= allowed:
                raise RunError(
                    f"{name}: the {what} is {error:.2g} from the plain one, more than {allowed:.0e}"
                )
        found[name] = errors
    return found


def measure(bench: Bench) -> dict[str, list[float]]:
    """Time both ways in turn, each round on other masks, and in the first what else there is; in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in bench.ways()}
    for number in range(bench.given.rounds):
        for name, (draws, work) in bench.ways().items():
            if number > 0 and name not in BOTH:
                continue
            samples = bench.samples(draws, seed=number)
            seconds[name].append(measure_seconds(partial(work, samples), bench.given.device))
    return seconds


def memory(bench: Bench, argv: list[str]) -> dict[str, Peak]:
    """Return the peak bytes of each way above what is held before it."""
    found = {}
    for name in bench.ways():
        if bench.given.device.startswith("cuda"):
            found[name] = peak_on_gpu(bench, name)
        else:
            command = [sys.executable, "-m", "benchmarks.update", *argv, "--alone", name]
            root = Path(__file__).parent.parent
            # what is freed goes back at once: else a heap with holes between tensors of unlike sizes counts
            returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
            done = subprocess.run(
                command, cwd=root, env=returned, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RunError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout)
    return found


def peak_on_gpu(bench: Bench, name: str) -> Peak:
    """Return the most bytes that the allocator held during one pass, above those before it."""
    draws, work = bench.ways()[name]
    samples = bench.samples(draws, seed=0)
    bench.policy.zero_grad()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        work(samples)
    except torch.OutOfMemoryError:
        bench.policy.zero_grad()
        return {"bytes": None, "by": "the device's memory was not enough"}
    return {"bytes": torch.cuda.max_memory_allocated() - before, "by": "torch.cuda.max_memory_allocated"}


def peak_alone(bench: Bench, name: str) -> Peak:
    """Return the most bytes resident during one pass above those before it, in a process that did no other.

    A pass over two short sequences comes first, so that libraries are loaded.
    """
    draws, work = bench.ways()[name]
    samples = bench.samples(draws, seed=0)
    with torch.no_grad():
        plain.all_logits(bench.policy, samples.tokens[0, :1, :8])
    trim()
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        resets.write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        work(samples)
        return {"bytes": _resident("VmHWM") - before, "by": "VmHWM of a process"}
    unit = 1 if sys.platform == "darwin" else 1024
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(samples)
    end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": (end - start) * unit, "by": "growth of ru_maxrss, no more than the peak's"}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def least(bench: Bench, way: str, draws: int) -> tuple[float, float]:
    """Return operations and bytes that a `way` can't do without; bytes: weights three times, gradients once.

    Ours needs the head, and the last layer, at scored positions alone; plain takes the logits of all, and
    writes and reads them, log-softmax and softmax of the completion's in float32.
    """
    sizes, given = Sizes.of(bench.policy), bench.given
    rows, total = given.group * draws, given.prompt + given.tokens
    scored = float(bench.samples(draws, seed=0).scored.sum()) / rows
    at_head = total if way == "plain" else scored
    trained = sum(p.numel() for p in bench.policy.parameters() if p.requires_grad)
    moved = 3.0 * sizes.read() + trained * sizes.weight_bytes
    if way == "plain":
        moved += 2 * rows * sizes.head * (total * sizes.weight_bytes + 2 * given.tokens * 4)
    return sizes.update(rows, total, at_head, at_head), moved


def main() -> None:
    """Check, time and compare; print tables, and write the figures to a JSON file."""
    argv = sys.argv[1:]
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--draws", type=int, default=2, help="m, masked samples of each completion")
    parser.add_argument(
        "--more-draws", type=numbers(int), default=[1, 2, 16], help="m of passes in pieces; 1,2,16 by default"
    )
    parser.add_argument("--beta", type=float, default=1.5, help="exponent of the upper bound")
    parser.add_argument("--omega", type=float, default=0.5, help="share of the upper bound in the mixture")
    parser.add_argument("--train-head", action="store_true", help="train the output head too")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # measure the memory of this one alone
    given = parse(parser)
    policy = make_policy(given)
    bench = Bench(policy, given)
    if given.alone is not None:
        sys.stdout.write(json.dumps(peak_alone(bench, given.alone)))
        return
    rate = rates(given, policy)
    checked = check(bench)
    if given.profile:
        for name, (draws, work) in bench.ways().items():
            sys.stdout.write(profile(name, partial(work, bench.samples(draws, seed=0))))
    seconds = measure(bench)
    rate = best_rates(rate, rates(given, policy))
    bytes_above = memory(bench, argv)
    both = compare(seconds["plain"], seconds["ours"])
    others = {name: spread(taken) for name, taken in seconds.items() if name not in BOTH}
    floors = {}
    for name, (draws, _) in bench.ways().items():
        median = sorted(seconds[name])[len(seconds[name]) // 2]
        floors[name] = floor(*least(bench, name, draws), rate, median)
    result = {
        "benchmark": "update",
        "machine": machine(given.device),
        "versions": versions(),
        "settings": list_settings(given, policy),
        "rates": rate,
        "checked": checked,
        "seconds": both | others,
        "memory": bytes_above,
        "floors": floors,
    }
    sys.stdout.write(table(f"update, m={given.draws}", {"loss and gradient": both}))
    whole = bytes_above["plain"]["bytes"]
    for name, peak in bytes_above.items():
        held = peak["bytes"]
        size = f"{held / 2**20:.0f} MiB" if isinstance(held, (int, float)) else peak["by"]
        if isinstance(held, (int, float)) and isinstance(whole, (int, float)):
            size = f"{size} ({held / whole:.2f} of plain)"
        median, share = spread(seconds[name])["median"], floors[name]["share"]
        sys.stdout.write(f"  {name}: {median:.4g} s, {size}; {share:.0%} of the roofline\n")
    write(result, given.output)


if __name__ == "__main__":
    run(main)
