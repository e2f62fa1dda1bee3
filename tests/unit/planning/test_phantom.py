"""Phantoms take what tensors take: the same operations, the same bytes alive and at the peak."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spg.models import head
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.lora import LoRA
from spg.models.policy import Policy
from spg.planning.phantom import Ledger, Phantom, Pretence, make_phantom
from tests.helpers import Ids
from tests.unit.models.test_qwen3 import small as small_qwen

LAYERS, WIDTH, INNER, VOCABULARY = 3, 32, 48, 131


def policy(precision: str = "32-true", adapter: bool = False, checkpointing: bool = False) -> Policy:
    network = LLaDA(LLaDAConfig(WIDTH, LAYERS, 2, 2, INNER, VOCABULARY, VOCABULARY), seed=None)
    network.checkpointing = checkpointing
    made = Policy(network, Ids(mask=126, eos=120, pad=120), precision)
    if adapter:
        made.adapt(LoRA(4, 8, 0.1, "released"))
    return made


def update(made: Policy, ledger: Ledger, rows: int = 5, length: int = 70) -> None:
    """Take the gradient of log-probabilities at some positions of padded sequences."""
    tokens = torch.arange(rows * length).view(rows, length) % 100
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[0, :3] = False
    scored = torch.ones(rows, 20, dtype=torch.bool)
    scored[1, 4:] = False
    ledger.begin()
    with ledger:
        made.token_logps(tokens, mask, tokens[:, -20:], scored).sum().backward()
    made.zero_grad()


def decode(made: Policy, ledger: Ledger) -> None:
    """Choose tokens by drawing."""
    tokens = torch.arange(4 * 70).view(4, 70) % 100
    columns = torch.arange(60, 68).expand(4, -1)
    ledger.begin()
    with ledger:
        made.propose(tokens, None, columns, 0.9, torch.full((4, 8), 0.5, dtype=torch.double))


class Planned(Policy):
    """A policy of phantoms, whose other tensors are on the CPU."""

    device = torch.device("cpu")


def as_phantom(made: Policy) -> Policy:
    moved = made.to("meta")
    make_phantom(moved)
    moved.__class__ = Planned
    return moved


@pytest.mark.parametrize("few", [0, head.FEW])
@pytest.mark.parametrize("work", [update, decode])
@pytest.mark.parametrize(
    "kind", [("32-true", False, False), ("bf16-mixed", True, False), ("bf16-mixed", True, True)]
)
def test_phantoms_take_what_tensors_take(
    kind: tuple[str, bool, bool],
    work: Callable[[Policy, Ledger], None],
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "FEW", few)
    found = []
    for stand_in in (False, True):
        made, ledger = policy(*kind), Ledger()
        work(as_phantom(made) if stand_in else made, ledger)
        found.append((ledger.peak, ledger.work.operations, ledger.work.kernels, ledger.work.moved))
    assert found[0] == found[1]
    assert found[0][0] > 5 * 70 * WIDTH


def test_operations_are_those_of_the_products() -> None:
    """Every product of a layer is listed; a backward pass has two for each, unless a factor is frozen."""
    made, ledger = policy(), Ledger()
    tokens = torch.arange(2 * 80).view(2, 80) % 100
    scored = torch.ones(2, 40, dtype=torch.bool)
    with ledger:
        made.token_logps(tokens, None, tokens[:, -40:], scored).sum().backward()
    positions, last = 2 * 80, 2 * 40
    keys, others = 2 * WIDTH * WIDTH, 2 * WIDTH * WIDTH + 3 * WIDTH * INNER
    matrices = (LAYERS - 1) * positions * (keys + others) + positions * keys + last * others
    # two products of attention forward and five backward, where the scores are made again
    attention = ((LAYERS - 1) * positions + last) * 80 * WIDTH * (2 + 5)
    head_of_all = last * WIDTH * VOCABULARY
    assert ledger.work.operations == 2 * (3 * matrices + attention + 3 * head_of_all)


def test_a_recomputed_layer_is_counted_twice() -> None:
    counts = []
    for checkpointing in (False, True):
        made, ledger = as_phantom(policy(checkpointing=checkpointing)), Ledger()
        update(made, ledger)
        counts.append(ledger.work.operations)
    assert 1.2 < counts[1] / counts[0] < 4 / 3


def test_memory_is_counted_for_as_long_as_it_lives() -> None:
    ledger = Ledger()
    with ledger:
        first = Phantom(torch.empty(100, 4, device="meta"))
        ledger.hold(first)
        second = first + torch.ones(4)
        view = second[10:20].T
        assert (ledger.live, isinstance(view, Phantom)) == (3200, True)
        del second
        assert ledger.live == 3200, "the view holds the whole"
        del view
        assert ledger.live == 1600
        first.mul_(2)
        torch.add(first, 1, out=first)
    assert ledger.peak == 1600 + 16 + 1600


def test_copies_are_separate_and_ties_stay() -> None:
    network = small_qwen(vocab_size=131).to("meta")
    make_phantom(network)
    held = Ledger()
    held.hold_all(network)
    once = held.live
    copied = copy.deepcopy(network)
    held.hold_all(copied)
    assert held.live == 2 * once
    tied = {id(p) for p in network.parameters()}
    assert len(tied) == len(list(network.parameters()))
    assert all(isinstance(p, nn.Parameter) and isinstance(p, Phantom) for p in copied.parameters())


def test_code_is_told_the_planned_device_and_makes_phantoms_there() -> None:
    x = Phantom(torch.empty(3, 8, device="meta"))
    assert x.device.type == "cpu"
    with Pretence("cuda"):
        assert x.device.type == "cuda"
        assert x.is_cuda
        assert isinstance(torch.arange(5, device=x.device), Phantom)
        assert isinstance(torch.empty_like(x), Phantom)
        assert x.to(x.device) is x
        assert x.to(x.device, torch.bfloat16).dtype == torch.bfloat16
        assert torch.ones(3).device.type == "cpu"
    with Pretence("cpu"):
        assert not isinstance(torch.arange(5, device=x.device), Phantom)


def test_a_gpu_keeps_a_mask_of_bytes_for_dropout_and_little_for_norms() -> None:
    def kept(device: str, work: Callable[[Tensor], Tensor]) -> int:
        x = nn.Parameter(Phantom(torch.empty(64, 256, device="meta")))
        ledger = Ledger()
        ledger.hold(x)
        with Pretence(device), ledger:
            result = work(x)
            return ledger.live - 2 * 64 * 256 * 4 if result is not None else 0

    assert kept("cuda", lambda x: nn.functional.dropout(x, 0.1)) == 64 * 256
    assert kept("cpu", lambda x: nn.functional.dropout(x, 0.1)) == 4 * 64 * 256
    assert kept("cuda", lambda x: nn.functional.rms_norm(x, (256,), eps=1e-5)) == 64 * 4
