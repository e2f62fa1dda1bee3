"""A decoding step and a piece of an update of LLaDA-8B, with its sizes and without its weights.

Operations on two devices fail, and so does reading a value: there are none. The numbers of kernels are what
is reached, and a change that raises them has to say why.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spg.models.policy import Policy
from tests.fake import large
from tests.fake.tensors import pretending

pytestmark = pytest.mark.fake


@pytest.fixture(scope="module")
def made() -> Iterator[Policy]:
    from tests.fake import build

    if build.missing is not None:
        pytest.skip(build.missing)
    with pretending(values=False):
        yield large.policy()


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoding_step(made: Policy, padded: bool) -> None:
    """In each of 32 layers: 7 products, 8 of the adapter, 3 a rotation, 2 norms, attention, and 4 sums."""
    large.step(made, 1, padded=padded)  # makes tables of positions
    counts = large.step(made, 6, padded=padded)
    assert not counts.waits
    assert sum(counts.kernels.values()) <= 32 * (7 + 8 + 2 * 3 + 2 + 1 + 4) + 40
    assert counts.kernels["_fused_rms_norm"] == 2 * 32 + 1
    assert counts.kernels["_scaled_dot_product_efficient_attention"] == 32 * padded
    assert counts.kernels["_scaled_dot_product_flash_attention"] == 32 * (not padded)
    assert counts.casts <= 4


@pytest.mark.parametrize(
    ("padded", "checkpointing", "most"), [(False, False, 3561), (True, False, 3561), (True, True, 5039)]
)
def test_a_piece_of_an_update(made: Policy, padded: bool, checkpointing: bool, most: int) -> None:
    made.network.checkpointing = checkpointing
    counts = large.piece(made, 2, padded=padded)
    assert not counts.waits
    assert sum(counts.kernels.values()) <= most
    trained = [p for p in made.parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 32
    # the last layer's query and up projections see the scored positions alone
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.is_cuda for p in trained)
