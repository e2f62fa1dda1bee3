"""`python -m tests.unit.planning.resident <part> <override>...`: bytes that a part of a run really takes.

The part is `rollout`, `update` or `evaluation` of one process on the CPU, with real weights. The figure is
the peak of the process's resident memory above what it held before.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import trim
from benchmarks.gpu import Real
from benchmarks.update import _resident
from spg import config
from spg.models.factory import build_policy
from spg.planning.policy import Policy
from spg.planning.stand_ins import prompting
from spg.rollout.collect import collect, complete


def grown(work: Any) -> int:
    """Return the bytes by which the process's peak exceeds what it holds before `work`."""
    trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def main() -> None:
    """Print the bytes of each part that is named."""
    part, *overrides = sys.argv[1:]
    cfg = config.compose("plan", [*overrides, "hardware=cpu"])
    torch.set_num_threads(1)
    real = Real(cfg, build_policy(cfg), prompting(cfg))
    t, policy = real.training, real.policy
    assert isinstance(policy, Policy)
    rows = real.task.examples("train")[: real.prompts]

    def roll_out() -> Any:
        return collect(policy, t.sampler, real.task, t.advantage, rows, t.group_size, seed=0)[0]

    short = torch.arange(16).view(2, 8)
    scored = torch.ones(2, 4, dtype=torch.bool)
    policy.token_logps(short, None, short[:, 4:], scored).sum().backward()  # libraries are loaded
    policy.zero_grad()
    if part == "rollout":
        size = grown(roll_out)
    elif part == "evaluation":
        count = cfg.trainer.eval_batch_size
        held = [real.task.examples("validation")[i] for i in range(count)]
        index = torch.arange(count)
        with policy.decoding():
            size = grown(lambda: complete(policy, t.evaluator, real.task, held, index, index, seed=0))
    else:
        batch = t.gradient.freeze(real.batch(roll_out()), policy_changes=True)
        policy.train("old" not in t.objective.needs)  # as `Training.update` does
        size = grown(lambda: t.gradient.add(batch))
    sys.stdout.write(f"{size}\n")


if __name__ == "__main__":
    main()
