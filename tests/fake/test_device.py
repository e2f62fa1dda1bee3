"""The pretended device itself: what it refuses, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fake.tensors import TwoDevicesError, counting, pretending

pytestmark = pytest.mark.fake


@pytest.fixture(autouse=True)
def _pretending() -> Iterator[None]:
    with pretending():
        yield


def test_tensors_say_where_they_are_and_hold_values() -> None:
    x = torch.arange(6, device="cuda").view(2, 3)
    assert x.device == torch.device("cuda:0")
    assert x.is_cuda
    assert torch.equal((x + 1).cpu(), torch.arange(1, 7).view(2, 3))
    assert torch.nn.Linear(3, 2).cuda().weight.is_cuda
    assert torch.cuda.is_available()


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: F.linear(x, torch.ones(2, 3)),
        lambda x: x.gather(0, torch.zeros(1, dtype=torch.long)),
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x),
    ],
)
def test_two_devices_in_one_operation_fail(mix: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TwoDevicesError):
        mix(torch.ones(3, device="cuda"))


def test_numbers_of_the_cpu_are_allowed() -> None:
    x = torch.ones(3, device="cuda") * torch.tensor(2.0)
    assert x.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("expected", "use"),
    [
        ("_local_scalar_dense", lambda x: bool(x.any())),
        ("_local_scalar_dense", lambda x: float(x.sum())),
        ("tolist", lambda x: x.tolist()),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("index_put_", lambda x: x.index_put_((x > 0,), x[:2].clone())),
        ("_unique2", lambda x: x.unique()),
        ("copy to the CPU", lambda x: x.cpu()),
        ("copy to the device", lambda x: torch.tensor([1.0], device="cuda")),
        ("copy to the device", lambda x: torch.ones(3).to("cuda", non_blocking=True)),
        ("index with indices of the CPU", lambda x: x[torch.tensor([0, 1])]),
        ("synchronize", lambda x: torch.cuda.synchronize()),
        (None, lambda x: (x * 2).masked_fill(x > 0, 1.0).cumsum(0).sort()),
        (None, lambda x: x.index_put_((x > 0,), torch.tensor(0.0))),
        (None, lambda x: x[torch.arange(2, device="cuda")]),
        (None, lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
    ],
)
def test_waits(expected: str | None, use: Callable[[Tensor], object]) -> None:
    x = torch.tensor([0.0, 1.0, 2.0], device="cuda")
    with counting() as counts:
        use(x)
    assert list(counts.waits) == ([] if expected is None else [f"elsewhere: {expected}"])
    assert max(counts.waits.values(), default=1) == 1


def test_a_wait_in_a_backward_pass_is_seen() -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    y = torch.zeros(3, device="cuda").masked_scatter(torch.ones(3, device="cuda", dtype=torch.bool), x)
    with counting() as counts:
        y.sum().backward()
    assert list(counts.waits) == ["backward: masked_scatter_backward"]


def test_kernels_are_those_of_a_gpu() -> None:
    """Fused operations count once, views and reserved memory not at all."""
    q = torch.randn(2, 3, 8, 16, device="cuda", requires_grad=True)
    with counting() as counts:
        F.rms_norm(q.transpose(1, 2).detach(), (16,), eps=1e-5)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        torch.empty(3, device="cuda").view(3, 1)
    kernels = counts.kernels
    assert kernels["_fused_rms_norm"] == kernels["_scaled_dot_product_efficient_attention"] == 1
    assert kernels["_scaled_dot_product_efficient_attention_backward"] == 1
    assert not kernels.keys() & {"view", "transpose", "empty", "detach", "softmax", "bmm", "pow"}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_gpu_compute_what_the_cpu_does(masked: bool, dtype: torch.dtype) -> None:
    found = []
    for device in ("cpu", "cuda"):
        x = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        x.requires_grad_()
        weight = torch.full((16,), 2.0, device=device, dtype=dtype, requires_grad=True)
        mask = (torch.arange(8, device=device) > 2).view(1, 1, 1, 8) if masked else None
        y = F.scaled_dot_product_attention(F.rms_norm(x, (16,), weight, 1e-5), x, x, attn_mask=mask)
        y.square().sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        found.append([t.detach().cpu().float() for t in (y, x.grad, weight.grad)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*found, strict=True))


def test_files_hold_tensors_of_the_device(tmp_path: Path) -> None:
    saved = {"x": torch.arange(3.0, device="cuda"), "y": torch.ones(2)}
    torch.save(saved, tmp_path / "file")
    with pytest.raises(RuntimeError, match="without map_location"):
        torch.load(tmp_path / "file")
    found = torch.load(tmp_path / "file", map_location="cpu", weights_only=True)
    assert found["x"].device.type == "cpu"
    assert found["x"].tolist() == [0.0, 1.0, 2.0]


def test_random_state_is_saved_and_restored() -> None:
    state = torch.cuda.get_rng_state("cuda")
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state, "cuda")
    assert torch.equal(first.cpu(), torch.rand(3, device="cuda").cpu())
