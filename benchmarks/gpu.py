"""What is to be seen on one GPU, in at most nine minutes and without a network: `python -m benchmarks.gpu`.

It runs the tests that need a GPU, a short run of the tiny model, and a LLaDA of 8 billion random weights:
rollouts with each cache and with compiled layers, updates with 2 and 16 draws, and their memory beside what
`spg.plan` says. Each part is a process of its own with a limit of time. A part that fails is recorded, and
the others go on. Figures go to benchmarks/results/gpu/ as JSON and as a table in Markdown. The exit status is
0 if all parts passed, 1 if one failed or had no time, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from benchmarks.common import machine, measure_seconds, versions
from spg import config
from spg.config import build
from spg.models.network import Network
from spg.models.policy import Policy
from spg.planning.measure import Measure
from spg.planning.phantom import Ledger
from spg.planning.stand_ins import Numbers, Prompting, StandIn, prompting
from spg.rollout.collect import collect

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
# seconds for everything
LIMIT = 540.0
# names in the name of a device, and the hardware of spg.plan
KNOWN = {"H200": "h200", "H100": "h100", "A100-SXM4-40GB": "a100_40", "A100": "a100", "4090": "rtx_4090"}

LARGE = ["model=llada_8b", "model.weights=random", "task=gsm8k", "group_size=6", "trainer.micro_batch_size=6"]
LARGE += ["trainer.prompts_per_rollout=1", "decoding.stop_at_eos=false", "masking.region=all", "mu=1"]
# the same code at the size of a toy
TOY = ["model=llada_toy", "task=gsm8k", "group_size=2", "trainer.micro_batch_size=2", "prompt_tokens=12"]
TOY += ["trainer.prompts_per_rollout=1", "decoding.stop_at_eos=false", "masking.region=all", "mu=1"]
TOY += ["gen_length=16", "block_size=8"]


@dataclass(frozen=True)
class Part:
    """A part of the command: its name, the seconds that it may take, and its command line."""

    name: str
    seconds: float
    command: tuple[str, ...]


class Real(Measure):
    """Runs the parts of a run as `spg.plan` does, on a policy with numbers.

    Args:
        cfg: Configuration of a plan.
        policy: The policy.
        found: Its prompts.
    """

    def __init__(self, cfg: DictConfig, policy: Policy, found: Prompting) -> None:
        self.cfg = cfg
        self.processes = 1
        self.task = found.task
        self.policy: Any = policy
        self.training = self._training()


def random_policy(cfg: DictConfig, tokenizer: Any, device: str) -> Policy:
    """Return a policy with weights drawn on the device, where eight billion take no time."""
    with torch.device("meta"):
        network: Network = build(cfg.model.network, seed=None)
    network.to(getattr(torch, cfg.model.dtype)).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    network.checkpointing = cfg.model.checkpointing
    policy = Policy(network, tokenizer, cfg.model.precision)
    policy.adapt(build(cfg.model.lora))
    return policy.to(device)


def compose(given: argparse.Namespace, *more: str) -> DictConfig:
    """Return the configuration of the large model, or of the toy."""
    hardware = "cpu"
    if not given.rehearse:
        name = torch.cuda.get_device_name()
        hardware = next((known for part, known in KNOWN.items() if part in name), "h100")
    return config.compose("plan", [*(TOY if given.rehearse else LARGE), f"hardware={hardware}", *more])


def made(cfg: DictConfig, given: argparse.Namespace) -> Real:
    """Return the parts of a run of the configured model with random weights and made-up prompts."""
    tokens = cfg.prompt_tokens or prompting(cfg).tokens
    numbers = Numbers(cfg.model.network.config.vocab_size)
    found = Prompting(StandIn(tokens), numbers, tokens, None, measured=False)
    return Real(cfg, random_policy(cfg, numbers, device(given)), found)


def device(given: argparse.Namespace) -> str:
    """Return the device that is measured."""
    return "cpu" if given.rehearse else "cuda"


def peak_of(work: Callable[[], Any], policy: Policy, where: str) -> int:
    """Return the most bytes that `work` holds above what is held before it."""
    if where == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ledger = Ledger()
    ledger.hold_all(policy)
    before = ledger.begin()
    with ledger:
        work()
    return ledger.peak - before


def planned(cfg: DictConfig) -> Measure:
    """Return what `spg.plan` measures."""
    return Measure(cfg, build(cfg.hardware), build(cfg.assumptions), prompting(cfg))


def roll_out(real: Real) -> Any:
    """Collect experience with a policy that has numbers."""
    t = real.training
    rows = real.task.examples("train")[: real.prompts]
    return collect(real.policy, t.sampler, real.task, t.advantage, rows, t.group_size, seed=0)[0]


def rollout(given: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Time a rollout with a cache, and measure its memory beside the plan."""
    cfg = compose(given, f"decoding.cache={cache}")
    return {f"rollout, cache={cache}": compared(made(cfg, given), planned(cfg).rollout()[0], given)}


def compared(real: Real, plan: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and memory of a rollout, after one that warms up, and what the plan says."""
    where = device(given)
    roll_out(real)
    seconds: list[float] = []
    peak = peak_of(lambda: seconds.append(measure_seconds(lambda: roll_out(real), where)), real.policy, where)
    return figures(seconds[0], peak, plan)


def figures(seconds: float, peak: int, plan: Any) -> dict[str, Any]:
    """Return what was measured and what was planned, side by side."""
    return {
        "seconds": seconds,
        "planned_seconds": plan.work.seconds,
        "bytes": peak,
        "planned_bytes": plan.bytes,
    }


def compiled(given: argparse.Namespace) -> dict[str, Any]:
    """Time a rollout with compiled layers."""
    cfg = compose(given, "decoding.cache=none")
    real = made(cfg, given)
    real.policy.network.compile_layers(**({"backend": "eager"} if given.rehearse else {}))
    return {"rollout, compiled": compared(real, planned(cfg).rollout()[0], given)}


def update(given: argparse.Namespace, draws: int) -> dict[str, Any]:
    """Time an update with so many draws, and measure its memory beside the plan."""
    cfg = compose(given, f"num_mc={draws}")
    real, where = made(cfg, given), device(given)
    gradient, batch = real.training.gradient, real.batch(roll_out(real))
    batch = gradient.freeze(batch, policy_changes=False)
    real.policy.train()

    def work() -> None:
        real.policy.zero_grad()
        gradient.add(batch)

    work()
    seconds = measure_seconds(work, where)
    real.policy.zero_grad()
    peak = peak_of(work, real.policy, where)
    measure = planned(cfg)
    part, _ = measure.update(measure.batch(measure.rollout()[1]), cfg.trainer.micro_batch_size)
    return {f"update, m={draws}": figures(seconds, peak, part)}


# each in a process of its own, so that none holds memory of another, or takes its figures along if it fails
MEASURED: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    **{f"rollout-{cache}": partial(rollout, cache=cache) for cache in ("none", "prefix", "dual")},
    "rollout-compiled": compiled,
    **{f"update-{draws}": partial(update, draws=draws) for draws in (2, 16)},
}


def parts(given: argparse.Namespace, folder: Path) -> list[Part]:
    """Return all parts in their order."""
    python = sys.executable
    own = [python, "-m", "benchmarks.gpu", *(["--rehearse"] if given.rehearse else [])]
    tests = [python, "-m", "pytest", "-n", "0", "-m", "gpu", "tests/integration/test_gpu.py"]
    tiny = [python, "-m", "spg.train", f"hydra.run.dir={folder / 'tiny'}", "trainer.validate_every=40"]
    if given.rehearse:
        tests.append("--collect-only")
        tiny += ["experiment=quick", "trainer.accelerator=cpu", "trainer.max_updates=4", "task.eval_size=8"]
    else:
        tiny += ["trainer.accelerator=cuda", "trainer.max_updates=80", "task.eval_size=64"]
    measured = [Part(name, 110.0, (*own, "--part", name)) for name in MEASURED]
    return [Part("tests", 150.0, tuple(tests)), Part("tiny run", 90.0, tuple(tiny)), *measured]


def run_parts(todo: Sequence[Part], limit: float, folder: Path) -> dict[str, Any]:
    """Run the parts one after the other; what fails or has no time left is recorded, and the others go on."""
    started = time.perf_counter()
    found: dict[str, Any] = {}
    for part in todo:
        left = limit - (time.perf_counter() - started)
        if left < 1:
            sys.stdout.write(f"{part.name}: skipped, the time of {limit:.0f} s is out\n")
            found[part.name] = {"state": "skipped"}
            continue
        sys.stdout.write(f"{part.name} ...\n")
        sys.stdout.flush()
        began = time.perf_counter()
        result = run_part(part, min(part.seconds, left), folder)
        found[part.name] = {**result, "wall_seconds": time.perf_counter() - began}
        sys.stdout.write(f"{part.name}: {result['state']}\n")
    return found


def run_part(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """Run one part; return its state, and its figures or the end of what it said."""
    try:
        done = subprocess.run(
            part.command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"state": "failed", "error": f"took more than {seconds:.0f} s"}
    if done.returncode:
        return {"state": "failed", "error": (done.stdout + done.stderr)[-3000:]}
    if part.name in MEASURED:
        return {"state": "passed", "figures": json.loads(done.stdout.splitlines()[-1])}
    if part.name == "tiny run":
        return judge_tiny(json.loads((folder / "tiny" / "summary.json").read_text(encoding="utf-8")))
    return {"state": "passed", "said": done.stdout.strip().splitlines()[-1]}


def judge_tiny(summary: dict[str, Any]) -> dict[str, Any]:
    """Return whether the accuracy of the validation half has risen."""
    before, best = summary["validation.before"], summary["validation.best"]
    state = "passed" if best > before or summary["updates"] <= 4 else "failed"
    return {"state": state, "figures": {"tiny run": {"accuracy before": before, "accuracy, best": best}}}


def table(found: dict[str, Any]) -> str:
    """Return all parts as a table in Markdown."""
    lines = ["| part | state | time | planned | memory | planned |", "| --- | --- | --- | --- | --- | --- |"]
    for name, result in found.items():
        rows = {k: v for k, v in result.get("figures", {}).items() if "seconds" in v}
        if not rows:
            lines.append(f"| {name} | {result['state']} | | | | |")
        for row, values in rows.items():
            times = f"{values['seconds']:.3g} s | {values['planned_seconds']:.3g} s"
            sizes = f"{values['bytes'] / 2**30:.3g} GiB | {values['planned_bytes'] / 2**30:.3g} GiB"
            lines.append(f"| {row} | {result['state']} | {times} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all parts, and write figures and table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # tiny shapes on the CPU
    parser.add_argument("--part", choices=list(MEASURED), help=argparse.SUPPRESS)  # this one, in this process
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        sys.stderr.write("torch finds no CUDA device here, and everything in this command needs one\n")
        sys.exit(2)
    if given.part is not None:
        sys.stdout.write(json.dumps(MEASURED[given.part](given)) + "\n")
        return
    with tempfile.TemporaryDirectory() as name:
        found = run_parts(parts(given, Path(name)), given.limit, Path(name))
    result = {"machine": machine(device(given)), "versions": versions(), "parts": found}
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "figures.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (given.output / "table.md").write_text(table(found), encoding="utf-8")
    sys.stdout.write(table(found))
    if any(part["state"] != "passed" for part in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
