"""Rollouts and updates on the pretended device: the same numbers as on the CPU, and how often the host waits.

Weights after two updates are those of the CPU up to rounding in float32. In bfloat16 both round at other
places, so that only a mistake of the device, not of a digit, would be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from spg import config
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder
from spg.training.module import Training
from tests.fake.tensors import counting, pretending
from tests.fake.toys import BLOCKS, STEPS, Learned, compose, learn, sections
from tests.helpers import Ids, golden_policy, open_prompts
from tests.unit.models.test_qwen3 import small as small_qwen

pytestmark = pytest.mark.fake

METHODS = sorted(path.stem for path in (config.CONF_DIR / "algorithm").glob("*.yaml"))
# no draw lies so close to a boundary between two tokens that rounding decides
SEED = 2
ADAPTERS = {"whole": [], "lora": ["model/lora=paper"]}

# equal rows of the first step are found, to compute them once
EQUAL_ROWS = {"distinct_rows: unique_dim": 1}
ROLLOUT = {
    "_counts: copy to the CPU": 1,  # holes of all blocks, and whether there is padding
    **EQUAL_ROWS,
    "Decoder._decode: tolist": BLOCKS - 1,  # which rows have ended, after a block
    "Policy.texts: copy to the CPU": 1,  # tokens of all completions, to score them
    "rollout_metrics: tolist": 1,  # the metrics
}
UPDATE = {
    "Copies.of: tolist": 1,  # sizes of everything that the pieces compute
    "update_metrics: tolist": 1,  # loss, norm of the gradient, figures
}
# masked copies of both updates are planned, if other policies' log-probabilities are needed
PLANS = "Copies.of: tolist"
# before the updates, by method; nothing for others
PREPARATION: dict[str, dict[str, int]] = {
    "coupled_grpo": {PLANS: 2},
    "d1": {PLANS: 2},
    "espo": {PLANS: 2},
    "unigrpo": {PLANS: 2},
    "reward_shift_grpo": {PLANS: 2},
    # for the masks of both updates: the largest number of decoding steps, of all and of a sequence
    "stepwise": {PLANS: 2, "Trajectory.__call__: _local_scalar_dense": 4},
    # whether groups are pairs
    "vrpo": {PLANS: 2, "partners: _local_scalar_dense": 1},
}


def check_waits(run: Learned, method: str) -> None:
    """Compare the waits of a run's parts with those above."""
    assert run.sections.waits("rollout") == [ROLLOUT]
    assert run.sections.waits("step") == [EQUAL_ROWS] + [{}] * (STEPS - 1)
    assert run.sections.waits("preparation") == [PREPARATION.get(method, {})]
    assert run.sections.waits("update") == [UPDATE, UPDATE]


def compare(here: Learned, there: Learned) -> None:
    """Compare weights and metrics with those of the CPU."""
    assert torch.allclose(here.weights(), there.weights(), atol=1e-6)
    for ours, theirs in zip(here.metrics, there.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in (n for n in ours if not n.startswith(("time/", "throughput/"))):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_method_learns_as_on_the_cpu(method: str, adapter: str) -> None:
    lines = [f"algorithm={method}", *ADAPTERS[adapter]]
    there = learn(compose(*lines), pretend=True)
    check_waits(there, method)
    compare(learn(compose(*lines), pretend=False), there)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_method_learns_in_bfloat16(method: str, adapter: str) -> None:
    there = learn(
        compose(f"algorithm={method}", "model.precision=bf16-mixed", *ADAPTERS[adapter]), pretend=True
    )
    check_waits(there, method)
    assert there.module.updates == 2
    assert there.weights().isfinite().all()


@pytest.mark.parametrize(("size", "method"), [(1, "spg"), (3, "spg"), (4, "vrpo")])
def test_pieces_add_no_wait(size: int, method: str) -> None:
    """With dropout, so that a second pass needs the random state of the first; layers are computed twice."""
    lines = [
        f"algorithm={method}",
        "num_mc=2",
        f"trainer.micro_batch_size={size}",
        "model.checkpointing=true",
        *ADAPTERS["lora"],
    ]
    there = learn(compose(*lines), pretend=True)
    check_waits(there, method)
    compare(learn(compose(*lines), pretend=False), there)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cache_adds_no_wait_to_a_step(cache: str, adapter: str, precision: str) -> None:
    lines = [f"decoding.cache={cache}", f"model.precision={precision}", *ADAPTERS[adapter]]
    there = learn(compose(*lines), pretend=True)
    assert there.sections.waits("step") == [EQUAL_ROWS] + [{}] * (STEPS - 1)
    # one decoding step is computed again: whether there is padding, and how many positions it committed
    compared = {
        "logp_difference: _local_scalar_dense": 1,
        "Positions.of_mask: tolist": 1,
    }
    assert there.sections.waits("rollout") == [ROLLOUT | compared]
    assert there.sections.waits("update") == [UPDATE, UPDATE]
    if precision == "32-true":
        compare(learn(compose(*lines), pretend=False), there)


def on_device(record: Any) -> Any:
    """Return prompts with their tensors on the pretended device."""
    moved = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in vars(record).items()}
    return type(record)(**moved)


def qwen() -> Policy:
    """Return a policy on Qwen3's layers."""
    return Policy(small_qwen(vocab_size=131), Ids(mask=126, eos=120, pad=120))


@pytest.mark.parametrize("made", [golden_policy, qwen])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9}, {"threshold": 0.5}, {"factor": 1.0}], ids=str)
def test_completions_are_those_of_the_cpu(made: Any, cache: str, options: Mapping[str, float]) -> None:
    """With one wait after a step, if the confidence decides how many tokens it commits."""
    prompts = open_prompts(
        torch.arange(54).view(6, 9), 16, torch.arange(9) >= torch.tensor([0, 0, 2, 2, 5, 1])[:, None]
    )
    decoder = Decoder(16, 4, 8, stop_at_eos=False, cache=cache, **options)  # type: ignore[arg-type]
    here = decoder(made().eval(), prompts, SEED)
    with pretending(), sections() as found, counting() as counts:
        there = decoder(made().eval().cuda(), on_device(prompts), SEED)
        assert torch.equal(here.completion_ids, there.completion_ids.cpu())
        assert torch.equal(here.commit_step, there.commit_step.cpu())
    steps = found.waits("step")
    assert steps[1:] == [{}] * (len(steps) - 1)
    turns = counts.waits["WhileOpen.turns: tolist"]
    assert turns == (len(steps) if "threshold" in options or "factor" in options else 0)


def test_an_update_that_learns_nothing_stays_on_the_device() -> None:
    """Equal rewards give no gradient, whose norm torch would make on the CPU."""
    there = learn(compose("group_size=2"), pretend=True, change=reward_equally)
    assert [row["grad_norm"] for row in there.metrics if "grad_norm" in row] == [0.0, 0.0]
    assert there.sections.waits("update") == [UPDATE, UPDATE]


def reward_equally(module: Training) -> None:
    module.advantage = lambda rewards: torch.zeros_like(rewards)
