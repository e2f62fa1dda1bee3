"""What several tests need: rollouts and experience by hand, small policies, golden files."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spg import config
from spg.cli.train import start
from spg.core.files import read_csv
from spg.core.types import Experience, Prompts, Rollout
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.policy import Policy
from spg.models.tokenizer import tiny_tokenizer
from tests import warm

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


def real_data(name: str) -> Path:
    """Return the path of a real data file, or skip the test where it is not at hand."""
    shared = Path(os.environ.get("SPG_SHARED", ROOT.parent / "shared"))
    path = shared / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand; set SPG_SHARED to the folder above data/")
    return path


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the arrays and the arguments of a golden case."""
    with np.load(GOLDEN / name) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "args_json"}
        return arrays, json.loads(str(file["args_json"]))


def rollout_of(
    holes: Tensor,
    *,
    given: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    completion_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    group: Tensor | None = None,
) -> Rollout:
    """Return a rollout whose region `to_eos` is `holes` [B T], all else made up where not given."""
    b, t = holes.shape
    if prompt_mask is None:
        prompt_mask = torch.ones(b, 3, dtype=torch.bool)
    if completion_mask is None:
        completion_mask = holes
    return Rollout(
        prompt_ids=torch.full(prompt_mask.shape, 5) if prompt_ids is None else prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=torch.full((b, t), 6) if completion_ids is None else completion_ids,
        completion_mask=completion_mask,
        given=torch.zeros_like(holes) if given is None else given,
        group=torch.zeros(b, dtype=torch.long) if group is None else group,
        index=torch.arange(b),
        commit_step=torch.zeros(b, t, dtype=torch.long),
        commit_logps=torch.zeros(b, t),
        near_ties=torch.zeros(b, dtype=torch.long),
        texts=("",) * b,
        examples=({},) * b,
    )


def experience_of(holes: Tensor, advantages: Tensor, **rollout: Any) -> Experience:
    """Return an experience with these advantages [B]; the rewards are made up."""
    return Experience(rollout_of(holes, **rollout), advantages + 1, {"all": advantages + 1}, advantages)


def golden_network() -> LLaDA:
    """Return the small LLaDA whose logits and decodings the goldens hold."""
    fields = json.loads((GOLDEN / "llada" / "config.json").read_text())
    names = [field.name for field in dataclasses.fields(LLaDAConfig)]
    network = LLaDA(LLaDAConfig(**{name: fields[name] for name in names}))
    network.load_state_dict(load_file(GOLDEN / "llada" / "tiny_llada.safetensors"))
    return network


class Ids:
    """A tokenizer of bare numbers, for networks that have no text."""

    unk_token_id = None
    chat_template = None

    def __init__(self, mask: int, eos: int, pad: int) -> None:
        self.mask_token_id, self.eos_token_id, self.pad_token_id = mask, eos, pad

    def __len__(self) -> int:
        return 131

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Write the numbers."""
        return " ".join(map(str, ids))


def golden_policy() -> Policy:
    """Return the golden network as a policy."""
    return Policy(golden_network(), Ids(mask=126, eos=120, pad=120))


def small_policy(seed: int = 0) -> Policy:
    """Return a policy with random weights and the tiny tokenizer."""
    config = LLaDAConfig(32, 2, 2, 2, 48, vocab_size=29, embedding_size=32, rope_theta=100.0)
    return Policy(LLaDA(config, seed=seed), tiny_tokenizer())


def open_prompts(ids: Tensor, length: int, mask: Tensor | None = None) -> Prompts:
    """Return prompts with free completions of `length` tokens."""
    n = len(ids)
    return Prompts(
        ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool) if mask is None else mask,
        template=torch.zeros(n, length, dtype=torch.long),
        given=torch.zeros(n, length, dtype=torch.bool),
        group=torch.arange(n),
        index=torch.arange(n),
        examples=({},) * n,
    )


def columns(tokens: Tensor, start: int, stop: int) -> Tensor:
    """Return the positions from `start` to `stop` for each row of tokens [N L]."""
    return torch.arange(start, stop).expand(len(tokens), -1)


QUICK = ("experiment=quick", "trainer.threads=1", "trainer.checkpoint_every=4")
# columns that tell wall-clock time
TIMES = ("time/", "throughput/")


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs an entry point; `module` may be a module of the tests too."""
    name = module if "." in module else f"spg.{module}"
    return [sys.executable, "-m", name, *arguments]


def run(module: str, *overrides: str, folder: Path | None = None, check: bool = True) -> str:
    """Run an entry point in a process of its own and return what it printed."""
    line = command(module, *overrides)
    if folder is not None:
        line.append(f"hydra.run.dir={folder}")
    done = warm.run(line, cwd=ROOT)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train_here(folder: Path, *overrides: str) -> Path:
    """Train in this process, as `spg.train` with QUICK would, and return the run's folder."""
    cfg = config.compose("config", [*QUICK, *overrides])
    start(cfg, folder, [])
    return folder


def comparable(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv, in their columns' order, without wall-clock times."""
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_csv(folder / "metrics.csv")
    ]


def same_run(first: Path, second: Path) -> bool:
    """Return whether two runs left the same weights and the same metrics.csv, bit for bit."""
    weights = [
        load_file(
            p / "weights.safetensors"
            if (p / "weights.safetensors").exists()
            else p / "adapter" / "adapter_model.safetensors"
        )
        for p in (first, second)
    ]
    equal = weights[0].keys() == weights[1].keys()
    equal = equal and all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    rows = [comparable(p) for p in (first, second)]
    headers = [[k for k in r[0] if not k.startswith(TIMES)] for r in rows]
    return equal and rows[0] == rows[1] and headers[0] == headers[1]
