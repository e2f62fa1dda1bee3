"""What a command imports: an evaluation or an export needs neither Lightning nor torch's compiler."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers import ROOT

# takes a second or more each, and only training needs it
HEAVY = ("lightning", "torch._dynamo", "peft", "datasets", "pandas", "matplotlib", "sympy")
PROGRAM = f"""
import sys
import spg.cli.evaluate, spg.cli.export, spg.cli.pairs
from spg import config
assert "torch" not in sys.modules, "the top of a command knows no torch"
import spg.evaluation.run, spg.evaluation.checkpoints, spg.models.export, spg.reports.model_card, torch
from spg.models.base_weights import existing
from spg.models.factory import build_policy
from spg.models.weights import load_weights
cfg = config.compose("config", [])
policy = build_policy(cfg, existing)
load_weights(policy.network, existing(cfg))
ids = torch.ones(1, 4, dtype=torch.long)
policy.token_logps(ids, None, ids[:, 2:], ids[:, 2:].bool())
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_evaluation_and_export_import_what_they_need() -> None:
    """In an interpreter of its own: those of other tests have imported everything."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
