"""Rollouts and updates on the pretended device: the same numbers as on the CPU, and how often the host waits.

Weights after two updates are those of the CPU up to rounding in float32. In bfloat16 both round at other
places, so that only a mistake of the device, not of a digit, would be seen.
"""

from __future__ import annotations

import pytest
import torch

from spg import config
from tests.fake.toys import Learned, compose, learn

pytestmark = pytest.mark.fake

METHODS = sorted(path.stem for path in (config.CONF_DIR / "algorithm").glob("*.yaml"))
ADAPTERS = {"whole": [], "lora": ["model/lora=paper"]}
# waits of the host for preparing two updates, and in each of the two
WAITS = {
    "coupled_grpo": (21, 14),
    "d1": (21, 14),
    "espo": (21, 14),
    "reward_shift": (2, 12),
    "reward_shift_grpo": (9, 12),
    "spg": (2, 12),
    "spg_eubo": (2, 12),
    "stepwise": (11, 12),
    "unigrpo": (21, 10),
    "vrpo": (16, 14),
    "wd1": (0, 11),
}
WAITS_OF_A_ROLLOUT = 24


def totals(run: Learned, part: str) -> list[int]:
    """Return how often the host waited in each call of a part."""
    return [sum(waits.values()) for waits in run.sections.waits(part)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_method_learns_as_on_the_cpu(method: str, adapter: str, precision: str) -> None:
    lines = [f"algorithm={method}", f"model.precision={precision}", *ADAPTERS[adapter]]
    there = learn(compose(*lines), pretend=True)
    preparation, update = WAITS[method]
    assert totals(there, "preparation") == [preparation], there.sections.waits("preparation")
    assert totals(there, "update") == [update, update], there.sections.waits("update")
    assert totals(there, "rollout") == [WAITS_OF_A_ROLLOUT], there.sections.waits("rollout")
    # equal rows are found in the first step
    assert totals(there, "step") == [3] + [0] * 7
    if precision == "32-true":
        here = learn(compose(*lines), pretend=False)
        assert torch.allclose(here.weights(), there.weights(), atol=1e-6)
