"""An own part of each kind, in a folder outside the package, is chosen, checked, trained with and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from spg import config
from spg.core.files import read_csv
from tests import warm
from tests.helpers import ROOT, command

METHOD = """
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from spg.algorithms.estimators import LikelihoodEstimator
from spg.algorithms.masking import MaskingStrategy
from spg.algorithms.objectives import ObjectiveResult
from spg.core.rules import Count, Positive, Probability, checked
from spg.core.seeding import Streams
from spg.core.types import MaskedSamples

Scale = Literal["per_token", "elbo_weight"]
Few = Annotated[int, Interval(ge=1, le=4)]


class PowerMean(LikelihoodEstimator):
    @checked
    def __init__(self, sharpness: Positive, normalization: Scale = "per_token") -> None:
        super().__init__(normalization)
        self.sharpness = sharpness

    def __call__(self, token_logps: Tensor, samples: MaskedSamples) -> Tensor:
        logps = token_logps.masked_fill(~samples.scored, 0.0)
        return self._mean_over_scored((samples.weight * logps).mean(1) / self.sharpness, samples)


class EveryOther(MaskingStrategy):
    draws_in_pairs = "alternating"

    @checked
    def __init__(self, num_mc: Few, prompt_mask_prob: Probability = 0.0) -> None:
        super().__init__(prompt_mask_prob)
        self.num_mc = num_mc

    def __call__(self, rollout, mask_id: int, seed: int) -> MaskedSamples:
        region = rollout.holes
        place = torch.arange(region.shape[1]) % 2
        draw = torch.arange(self.num_mc) % 2
        scored = region.unsqueeze(1) & (place == draw[:, None])
        prompt = self._mask_prompt(rollout.prompt_mask, self.num_mc, Streams(seed, rollout.index))
        beyond = (~rollout.given & ~region).unsqueeze(1)
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], -1).unsqueeze(1)
        tokens = ids.masked_fill(torch.cat([prompt, scored | beyond], -1), mask_id)
        return MaskedSamples(tokens, scored, scored * 2.0, region)


class Best:
    def __call__(self, rewards: Tensor) -> Tensor:
        return rewards - rewards.amin(-1, keepdim=True)


class Imitate:
    needs_sums = True
    completions_per_prompt = 2

    @checked
    def __init__(self, estimator: LikelihoodEstimator, strength: Positive = 1.0) -> None:
        self.estimator = estimator
        self.strength = strength
        self.needs = frozenset()

    def learns_from(self, experience) -> Tensor:
        return experience.advantages > 0

    def __call__(self, token_logps: Tensor, batch) -> ObjectiveResult:
        bound = self.estimator(token_logps, batch.samples).sum(-1)
        loss = -self.strength * (batch.experience.advantages * bound).sum() / len(batch.cohort.group)
        return ObjectiveResult(loss, {"bound/lower": bound})
"""

PUZZLES = """
from spg.core.rules import Count, checked


class Echo:
    name = "echo"
    parser = "exact"
    shots = 0
    workers = 1
    ordered = (("shortest", "longest"),)

    @checked
    def __init__(self, shortest: Count = 1, longest: Count = 3, eval_size: Count = 8) -> None:
        self.numbers = range(10 ** (shortest - 1), 10**longest)
        self.eval_size = eval_size

    def examples(self, split):
        first = {"train": 0, "validation": 500, "test": 600, "heldout": 500}[split]
        return [{"text": str(self.numbers[first + i])} for i in range(self.eval_size)]

    def demonstrations(self):
        return self.examples("train")

    def prompt(self, example):
        return example["text"] + "="

    def template(self, example):
        return None

    def target(self, example):
        return example["text"]

    def reward(self, example, completion):
        return {"digits": sum(character.isdigit() for character in completion) / 4}

    def answer(self, example, completion):
        return completion.strip() or None

    def measure(self, example, completion):
        return {"accuracy": float(self.answer(example, completion) == example["text"])}

    def example_of(self, record):
        return record["example"]
"""

MODEL = """
from dataclasses import dataclass

from spg.core.rules import Positive, checked
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.tokenizer import tiny_tokenizer


@checked
@dataclass(frozen=True)
class SmallConfig(LLaDAConfig):
    shrink: Positive = 1.0


class Small(LLaDA):
    def __init__(self, config: SmallConfig, seed: int | None = 0) -> None:
        super().__init__(config, seed)


def tokenizer(side: str = "left"):
    made = tiny_tokenizer()
    made.padding_side = side
    return made
"""

OPTIONS = {
    "estimator/mine": """
        # My weighted mean of log-probabilities.
        _target_: lab.method.PowerMean
        sharpness: ${beta}
        normalization: ${algorithm.normalization}
    """,
    "masking/mine": """
        # My alternating masks.
        _target_: lab.method.EveryOther
        num_mc: ${num_mc}
    """,
    "advantage/mine": """
        # My advantage over the worst completion.
        _target_: lab.method.Best
    """,
    "algorithm/mine": """
        # @package _global_
        # My imitation of the better of two completions.
        defaults:
          - override /masking: mine
          - override /estimator: mine
          - override /advantage: mine

        group_size: 2
        algorithm:
          normalization: elbo_weight
          objective:
            _target_: lab.method.Imitate
            estimator: ${estimator}
            strength: 0.5 # how much the better completion counts
    """,
    "task/mine": """
        # @package _global_
        # My task: repeat a number.
        task:
          _target_: lab.puzzles.Echo
          shortest: 1
          longest: 3 # digits, at most
          eval_size: 8

        gen_length: 4
        block_size: 2
        decoding:
          steps: 4
        pretrain: {steps: 1, batch_size: 8, lr: 1e-3, seed: 0}
    """,
    "model/mine": """
        # My network, with random weights.
        defaults:
          - tiny
          - _self_

        network:
          _target_: lab.model.Small
          config:
            _target_: lab.model.SmallConfig
            d_model: 16
            n_layers: 1
            n_heads: 2
            mlp_hidden_size: 24
            shrink: 2.0 # my setting
        tokenizer:
          _target_: lab.model.tokenizer
        weights: random
    """,
}
MINE = ["task=mine", "model=mine", "estimator=mine", "masking=mine", "advantage=mine", "algorithm=mine"]
TINY = [
    "trainer.max_updates=4",
    "trainer.prompts_per_rollout=2",
    "trainer.checkpoint_every=2",
    "trainer.validate_every=4",
    "trainer.threads=1",
    "mu=2",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a module `lab`, of one part of each kind, and their YAML files in `conf/`."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in {"__init__": "", "method": METHOD, "puzzles": PUZZLES, "model": MODEL}.items():
        path = folder / "lab" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for option, text in OPTIONS.items():
        path = folder / "conf" / f"{option}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip())
    return folder


def environment(lab: Path) -> dict[str, str]:
    """Return an environment in which the module `lab` can be imported."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(lab), str(ROOT)])}


def test_the_answer_about_an_own_part_comes_before_torch_and_the_part_are_imported(lab: Path) -> None:
    arguments = ["-cd", str(lab / "conf"), *MINE, "beta=-1"]
    code = (
        "import sys; from spg.cli import launch\n"
        f"sys.argv = ['train', *{arguments!r}]\n"
        "try:\n    launch.run('config', print)\n"
        "finally:\n    assert not {'torch', 'lightning', 'lab'} & set(sys.modules)\n"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(lab), check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == "beta=-1: out of range; allowed: a number above 0\n"


def test_an_own_part_of_each_kind_trains_and_resumes(lab: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = command("train", "-cd", str(lab / "conf"), *MINE, *TINY, f"hydra.run.dir={run_dir}")
    done = warm.run(line, cwd=ROOT, env=environment(lab))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(run_dir / "metrics.csv")
    assert [int(row["update"]) for row in rows if row.get("loss")] == [1, 2, 3, 4]
    assert json.loads((run_dir / "summary.json").read_text())["unused_knobs"] == ["omega"]
    line = command("train", f"resume={run_dir}", "trainer.max_updates=6")
    done = warm.run(line, cwd=ROOT, env=environment(lab))
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(read_csv(run_dir / "metrics.csv")[-1]["update"]) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["beta=-1"], "beta=-1: out of range; allowed: a number above 0"),
        (["num_mc=6"], "num_mc=6: out of range; allowed: a whole number from 1 to 4"),
        (["algorithm.objective.strength=0"], "algorithm.objective.strength=0: out of range"),
        (["model.network.config.shrink=0"], "model.network.config.shrink=0: out of range"),
        (["model.network.config.n_heads=0"], "model.network.config.n_heads=0: out of range"),
        (["task.eval_size=0"], "task.eval_size=0: out of range; allowed: a whole number, 1 or more"),
        (["task.shortest=4"], "task.shortest=4 is above task.longest=3"),
        (["task.shortes=1"], "nearest: task.shortest"),
        (["num_mc=3"], "num_mc=3 is odd: alternating pairs"),
        (["group_size=4"], "group_size=4, but Imitate compares 2 completions of each prompt"),
        (["algorithm.normalization=per_token"], "Imitate needs log-likelihoods of whole sequences"),
        (["estimator=mien"], "nearest: estimator=mine"),
        (["task=min"], "nearest: task=mine"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_in_an_own_part_is_answered_early(
    lab: Path, change: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(lab))
    with pytest.raises(config.ConfigError, match=re.escape(words)):
        config.preflight("config", ["-cd", str(lab / "conf"), *MINE, *change])


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (
            "sharpnes: ${beta}",
            "estimator.sharpnes: PowerMean takes no 'sharpnes'; allowed: sharpness, normalization; nearest: "
            "estimator.sharpness",
        ),
        ("_target_: lab.method.PowrMean", "lab.method has no PowrMean; nearest: lab.method.PowerMean"),
        ("_target_: lab.metod.PowerMean", "lab has no metod; nearest: lab.method"),
        ("_target_: lba.method.PowerMean", "there is no module lba; give a dotted path"),
    ],
)
def test_a_slip_in_an_own_file_is_answered_early(
    lab: Path, slip: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(lab))
    shutil.copytree(lab / "conf", tmp_path / "conf")
    file = tmp_path / "conf" / "estimator" / "mine.yaml"
    key = re.match(r"_?[a-z]+", slip)[0][:6]
    lines = [slip if line.startswith(key) else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))
    with pytest.raises(config.ConfigError, match=re.escape(words)):
        config.preflight("config", ["-cd", str(tmp_path / "conf"), *MINE])


def test_help_lists_own_options(lab: Path) -> None:
    line = command("train", "-cd", str(lab / "conf"), "--help")
    done = warm.run(line, cwd=ROOT, env=environment(lab))
    assert done.returncode == 0, done.stderr
    for words in (
        "My weighted mean",
        "My alternating masks",
        "My task",
        "My network",
        "My imitation",
    ):
        assert words in done.stdout
