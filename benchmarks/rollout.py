"""How long a rollout takes, compared with one done the plain way (benchmarks/plain.py), both in turn.

`python -m benchmarks.rollout` times a random LLaDA of 20 million parameters; with overrides of spg.train
(`model=llada_8b model.weights=random --device cuda --full`) any other. First it checks that both do the same
work: at temperature 0 the tokens are equal; above it the first step's probabilities agree, and what either
draws is as likely as it should be.

A whole rollout is minutes of plain work on CPU. There the first block and the middle one of the others are
timed, from the states that a rollout meets them in, and the middle one counts for all others, since a block's
cost is constant or linear in its number; --full times everything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
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
    table,
    versions,
    write,
)
from spg.core.errors import RunError
from spg.core.types import Prompts, Rollout
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder

Part = int | None  # the number of a block, or None for a whole rollout

# in bfloat16 choices can only be as near to the best ones as its 8 bits tell logits apart
NEAR = 0.25
# standard deviations by which what is drawn may be more or less likely than expected
DEVIATIONS = 5.0


class Bench:
    """Rollouts at one temperature, whole or block by block, done either way from the same states."""

    def __init__(self, policy: Policy, given: argparse.Namespace, temperature: float) -> None:
        self.policy = policy
        self.given = given
        self.temperature = temperature
        self.blocks = given.tokens // given.block
        # at temperature 0 equal rows stay equal, and ours would compute one of them only
        self.prompts = make_prompts(policy, given, distinct=temperature == 0)
        self.masked = torch.cat([self.prompts.ids, self.prompts.template], 1)
        # what stands in earlier blocks matters to no time: one step each will do
        self.filled = self.decode(self.prompts, self.blocks).completion_ids

    def parts(self) -> dict[Part, int]:
        """Return what is timed, and for how many blocks (or rollouts) each part counts."""
        if self.given.full:
            return {None: 1}
        return {0: 1} if self.blocks == 1 else {0: 1, self.blocks // 2: self.blocks - 1}

    def decode(self, prompts: Prompts, steps: int, seed: int = 0, **settings: Any) -> Rollout:
        """Decode as this project does, without stopping at EOS unless `settings` say so."""
        settings = {"stop_at_eos": False, **settings}
        length = prompts.template.shape[1]
        return Decoder(length, self.given.block, steps, self.temperature, **settings)(
            self.policy, prompts, seed
        )

    def at(self, part: Part) -> Prompts:
        """Return what a part starts from: earlier blocks belong to the prompt, later ones stay masked."""
        if part is None:
            return self.prompts
        start = part * self.given.block
        ids = torch.cat([self.prompts.ids, self.filled[:, :start]], 1)
        later = torch.ones_like(self.prompts.given[:, start:])
        later[:, : self.given.block] = False
        template = self.prompts.template[:, start:]
        return replace(
            self.prompts, ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), template=template, given=later
        )

    def ours(self, part: Part, cache: str = "none", seed: int = 0) -> Rollout:
        """Decode a part as this project does."""
        prompts = self.at(part)
        left = prompts.template.shape[1] // self.given.block
        return self.decode(prompts, self.given.steps // self.blocks * left, seed, cache=cache)

    def plain(self, part: Part, seed: int = 0) -> Tensor:
        """Decode a part the plain way; return the completion [N T], later blocks masked."""
        return self.plain_from(self.masked, part, self.filled, seed)

    def plain_from(self, tokens: Tensor, part: Part, earlier: Tensor, seed: int = 0) -> Tensor:
        """Decode a part of tokens [N L] the plain way; earlier blocks are those of `earlier` [N T]."""
        width, block = self.given.prompt, self.given.block
        tokens = tokens.clone()
        if part is not None:
            tokens[:, width : width + part * block] = earlier[:, : part * block]
        generator = torch.Generator(tokens.device).manual_seed(seed)
        blocks = None if part is None else [part]
        sizes = (width, block, self.given.steps)
        return plain.rollout(self.policy, tokens, *sizes, self.temperature, generator, blocks)[:, width:]

    def ours_to_eos(self, length: int, cache: str = "none", seed: int = 0) -> Rollout:
        """Decode as this project does, with token number `length` of each row given as EOS."""
        template, given = self.prompts.template.clone(), self.prompts.given.clone()
        template[:, length - 1], given[:, length - 1] = self.policy.eos_id, True
        prompts = replace(self.prompts, template=template, given=given)
        return self.decode(prompts, self.given.steps, seed, cache=cache, stop_at_eos=True)


def check(bench: Bench) -> dict[str, Any]:
    """Check that both ways do the same work; raise RunError if they don't."""
    if bench.temperature > 0:
        return {"first_step": check_probabilities(bench), "draws": check_draws(bench)}
    found: dict[str, Any] = {}
    for part in bench.parts():
        ours = bench.ours(part)
        start = 0 if part is None else part * bench.given.block
        if bench.policy.precision == "32-true":
            same = ours.completion_ids == bench.plain(part)[:, start:]
            if not bool(same.all()):
                raise RunError(
                    f"plain and ours decode {int((~same).sum())} of {same.numel()} tokens differently at "
                    "temperature 0, so their times can't be compared"
                )
            found[_part_name(part)] = {"tokens": "identical", "of": same.numel()}
        else:
            found[_part_name(part)] = check_choices(bench, ours)
        for cache in bench.given.caches:
            if cache != "none":
                equal = bench.ours(part, cache).completion_ids == ours.completion_ids
                found[_part_name(part)][f"{cache}_equals_none"] = float(equal.float().mean())
    if bench.policy.precision == "32-true":
        for length in bench.given.lengths:
            check_early_stop(bench, length)
    return found


def check_early_stop(bench: Bench, length: int) -> None:
    """Check that the block of a row's EOS is as plain decodes it, and that EOS follows; raises RunError."""
    done = bench.ours_to_eos(length).completion_ids
    tokens = bench.masked.clone()
    tokens[:, bench.given.prompt + length - 1] = bench.policy.eos_id
    part = (length - 1) // bench.given.block
    end = (part + 1) * bench.given.block
    expected = bench.plain_from(tokens, part, done)[:, :end]
    if not (torch.equal(done[:, :end], expected) and bool((done[:, end:] == bench.policy.eos_id).all())):
        raise RunError(f"rows that stop at token {length} are not those that plain decodes")


def check_choices(bench: Bench, rollout: Rollout) -> dict[str, Any]:
    """Check a greedy rollout's choices against plain logits, each in the state that it was made in.

    Returns by how much a committed token's logit fell short of the largest, and the log-probability of a
    committed position of the highest one left open. Raises RunError if bfloat16 does not explain it.
    """
    width, block = rollout.prompt_ids.shape[1], bench.given.block
    token = position = 0.0
    for step in sorted(set(rollout.commit_step.flatten().tolist())):
        now = rollout.commit_step == step
        if step < 0 or not bool(now.any()):
            continue
        open_yet = (rollout.commit_step >= step) | (rollout.commit_step < 0)
        state = rollout.completion_ids.masked_fill(open_yet, bench.policy.mask_id)
        with torch.no_grad(), bench.policy.autocast():
            logits = plain.all_logits(bench.policy, torch.cat([rollout.prompt_ids, state], 1))[:, width:]
        logits = logits.float()
        own = logits.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
        best = logits.amax(-1)
        token = max(token, float((best - own)[now].max()))
        confidence = best - logits.logsumexp(-1)
        current = int(now.any(0).nonzero()[0]) // block
        inside = torch.arange(now.shape[1], device=now.device) // block == current
        left = (rollout.commit_step > step) & inside
        behind = confidence.masked_fill(~left, -torch.inf).amax(-1)
        least = confidence.masked_fill(~now, torch.inf).amin(-1)
        position = max(position, float((behind - least).max()))
    if max(token, position) > NEAR:
        raise RunError(
            f"ours chose a token {token:.3f} below the largest logit, or a position {position:.3f} below the "
            f"surest one, by plain logits; bfloat16 explains {NEAR}"
        )
    return {"tokens": "near", "logit_short_by": token, "log_probability_short_by": position, "allowed": NEAR}


@torch.no_grad()
def check_probabilities(bench: Bench) -> dict[str, Any]:
    """Check the log-probabilities of the first step; raises RunError."""
    policy, targets = bench.policy, bench.filled
    every = torch.ones_like(targets, dtype=torch.bool)
    ours = policy.token_logps(bench.masked, None, targets, every)
    with policy.autocast():
        logits = plain.all_logits(policy, bench.masked)[:, bench.given.prompt :]
    expected = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    error = float(((ours - expected).abs() / expected.abs().clamp_min(1)).max())
    allowed = TOLERANCE[policy.precision]
    if error > allowed:
        raise RunError(f"log-probabilities of the first step are {error:.2g} apart, more than {allowed:.0e}")
    return {"relative_error": error, "allowed": allowed}


@torch.no_grad()
def check_draws(bench: Bench, repeats: int = 4) -> dict[str, Any]:
    """Check that what is drawn has the log-probability that draws have on average; raises RunError.

    All tokens of the first block are drawn at once, `repeats` times; the distance from the expected sum is
    given in its standard deviations.
    """
    policy, block = bench.policy, bench.given.block
    window = slice(bench.given.prompt, bench.given.prompt + block)
    with policy.autocast():
        logits = plain.all_logits(policy, bench.masked)[:, window].double() / bench.temperature
    found: dict[str, Any] = {"draws": repeats * logits.shape[0] * block, "allowed": DEVIATIONS}
    for name in ("plain", "ours"):
        if name == "ours":  # neither [MASK] nor what is no token
            logits[..., len(policy.tokenizer) :] = -torch.inf
            logits[..., [i for i in {policy.mask_id, policy.pad_id} if i != policy.eos_id]] = -torch.inf
        logps = logits.log_softmax(-1)
        finite = logps.masked_fill(logps == -torch.inf, 0.0)
        mean = (logps.exp() * finite).sum(-1)
        variance = (logps.exp() * finite.square()).sum(-1) - mean.square()
        excess = torch.zeros((), dtype=torch.double, device=logits.device)
        for seed in range(repeats):
            if name == "plain":
                generator = torch.Generator(logits.device).manual_seed(seed)
                with policy.autocast():
                    ids, _ = plain.choose(
                        plain.all_logits(policy, bench.masked), bench.temperature, generator
                    )
                ids = ids[:, window]
            else:
                ids = bench.decode(bench.at(0), bench.blocks, seed).completion_ids[:, :block]
            excess += (finite.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - mean).sum()
        found[name] = float(excess / (repeats * variance.sum()).sqrt())
        # in bfloat16 the plain way's noise has 256 values and its draws are off: that is reported only
        if abs(found[name]) > DEVIATIONS and (name == "ours" or policy.precision == "32-true"):
            raise RunError(
                f"what {name} draws is {found[name]:.1f} standard deviations from what is expected"
            )
    return found


def measure(bench: Bench, before: Mapping[str, float]) -> dict[str, Any]:
    """Time plain and ours in turn; return what was checked, seconds of a rollout, rates and floors.

    before: rates that were measured earlier; they are measured again at the end.
    """
    given = bench.given
    checked = check(bench)
    works: dict[str, tuple[Callable[..., Any], dict[Part, int]]] = {"plain": (bench.plain, bench.parts())}
    for cache in given.caches:
        works[cache] = (partial(bench.ours, cache=cache), bench.parts())
        for length in given.lengths:
            stopping = partial(_ours_to_eos, bench, length, cache)
            works[f"{cache}, EOS at {length}"] = (stopping, {None: 1})
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(given.rounds):
        for name, (work, parts) in works.items():
            taken = (
                count * measure_seconds(partial(work, part, seed=number), given.device)
                for part, count in parts.items()
            )
            seconds[name].append(sum(taken))
    rows = {name: compare(seconds["plain"], seconds[name]) for name in works if name != "plain"}
    sizes, rate = Sizes.of(bench.policy), best_rates(before, rates(given, bench.policy))
    floors = {}
    for name in ("plain", *given.caches):
        median = sorted(seconds[name])[len(seconds[name]) // 2]
        floors[name] = floor(*least(given, sizes, name, bench.temperature), rate, median)
    return {"checked": checked, "seconds": rows, "rates": rate, "floors": floors}


def _ours_to_eos(bench: Bench, length: int, cache: str, part: Part, seed: int) -> Rollout:
    return bench.ours_to_eos(length, cache, seed)


def least(given: argparse.Namespace, sizes: Sizes, way: str, temperature: float) -> tuple[float, float]:
    """Return operations and bytes that a rollout can't do without, the plain `way` or with a cache.

    Each pass reads the weights once, writes its logits and reads them, and reads what it sees of a cache.
    Ours needs the head and the last layer at the positions that are open; a first step's equal rows once.
    """
    blocks, total = given.tokens // given.block, given.prompt + given.tokens
    each = given.steps // blocks
    operations = moved = 0.0
    for number in range(blocks):
        for step in range(min(each, given.block)):
            opened = given.block - step * (given.block // each) - min(step, given.block % each)
            positions, rows = total, given.group
            if way == "plain":
                last = at_head = float(total)
            else:
                last = at_head = float(opened)
                if way != "none" and step > 0:
                    start = given.prompt + number * given.block
                    positions = given.block if way == "dual" else total - start
                    moved += sizes.layers * rows * total * sizes.keys * sizes.weight_bytes
                if number == step == 0 and temperature > 0:
                    rows = 1
            operations += sizes.forward(rows, positions, total, last, at_head)
            moved += sizes.read() + 2 * rows * at_head * sizes.head * sizes.weight_bytes
    return operations, moved


def _part_name(part: Part) -> str:
    return "whole" if part is None else f"block {part}"


def main() -> None:
    """Check, time and compare; print a table, and write the figures to a JSON file."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=128, help="steps of a completion")
    parser.add_argument("--temperatures", type=numbers(float), default=[0.0, 0.9], help="0,0.9 by default")
    parser.add_argument("--caches", type=str, default="none", help="of none, prefix, dual; with commas")
    parser.add_argument(
        "--lengths",
        type=numbers(int),
        default=[],
        help="rollouts that stop because all rows have EOS there: 78,176",
    )
    parser.add_argument("--full", action="store_true", help="time whole rollouts")
    given = parse(parser)
    given.caches = given.caches.split(",")
    if unknown := set(given.caches) - {"none", "prefix", "dual"}:
        parser.error(f"--caches {', '.join(sorted(unknown))} is not one of none, prefix, dual")
    if given.steps < 1 or given.steps % (given.tokens // given.block):
        parser.error(f"--steps {given.steps} must be a multiple of the number of blocks")
    if any(not 1 <= length <= given.tokens for length in given.lengths):
        parser.error(f"--lengths must be from 1 to --tokens {given.tokens}")
    policy = make_policy(given)
    rate = rates(given, policy)
    result: dict[str, Any] = {
        "benchmark": "rollout",
        "machine": machine(given.device),
        "versions": versions(),
        "settings": list_settings(given, policy),
        "timed": "whole rollouts" if given.full else "first block + the middle one of the others for each",
        "temperatures": {},
    }
    for temperature in given.temperatures:
        bench = Bench(policy, given, temperature)
        if given.profile:
            part = next(iter(bench.parts()))
            sys.stdout.write(profile(f"plain, {_part_name(part)}", partial(bench.plain, part)))
            for cache in given.caches:
                sys.stdout.write(profile(f"{cache}, {_part_name(part)}", partial(bench.ours, part, cache)))
        figures = measure(bench, rate)
        rate = figures["rates"]
        result["temperatures"][str(temperature)] = figures
        write(result, given.output)  # now, so that a failure at the next temperature does not lose it
        sys.stdout.write(table(f"temperature {temperature}", figures["seconds"]))
        for name, row in figures["floors"].items():
            sys.stdout.write(f"  {name}: {row['share']:.0%} of the roofline of {row['seconds']:.3g} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run(main)
