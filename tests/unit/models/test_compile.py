"""Compiled layers: the same figures, in few programs. Traced, not made into code, which takes a minute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch._dynamo.utils import counters

from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.lora import LoRA
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder
from tests.helpers import Ids, open_prompts


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def policy_of(layers: int) -> Policy:
    sizes = LLaDAConfig(32, layers, 2, 2, 48, vocab_size=131, embedding_size=131)
    return Policy(LLaDA(sizes), Ids(mask=126, eos=120, pad=120))


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_layer_is_one_program_and_gives_the_same(adapted: bool) -> None:
    g = torch.Generator().manual_seed(0)
    found = []
    for compiled in (False, True):
        policy = policy_of(3)
        if adapted:
            policy.adapt(LoRA(4, 8, 0.0, "all"))
        if compiled:
            policy.network.compile_layers("eager")
        for width in (20, 27):
            ids = torch.randint(0, 120, (3, width), generator=g.manual_seed(1))
            mask = torch.arange(width) >= torch.tensor([[0], [2], [3]])
            scored = torch.rand(3, 9, generator=g) < 0.5
            policy.zero_grad()
            policy.token_logps(ids, mask, ids[:, -9:], scored).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert torch.allclose(*found, atol=1e-5 * float(found[0].abs().max()))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize(
    ("cache", "rule"),
    [
        ("dual", {"threshold": 0.02}),
        pytest.param("dual", {}, marks=pytest.mark.long),
        pytest.param("prefix", {"threshold": 0.02}, marks=pytest.mark.long),
        pytest.param("none", {"threshold": 0.02}, marks=pytest.mark.long),
        pytest.param("none", {}, marks=pytest.mark.long),
    ],
)
def test_a_second_rollout_compiles_nothing(cache: Literal["none", "prefix", "dual"], rule: Any) -> None:
    """Of other prompts, of other lengths, in other numbers; some equal other sizes by chance."""
    g = torch.Generator().manual_seed(0)
    plain, compiled = policy_of(2), policy_of(2)
    compiled.network.compile_layers("eager")
    decoder = Decoder(8, 4, 8, 1.0, stop_at_eos=False, cache=cache, **rule)
    programs = []
    for rows, width in ((4, 9), (9, 4), (3, 15)):
        ids = torch.randint(0, 119, (rows, width), generator=g)
        prompts = open_prompts(ids, 8, torch.arange(width) >= torch.randint(0, 4, (rows, 1), generator=g))
        prompts.mask[:2] = torch.tensor([[True], [False]]) | (torch.arange(width) > 1)
        expected, ours = (decoder(policy, prompts, 0) for policy in (plain, compiled))
        assert torch.equal(expected.completion_ids, ours.completion_ids)
        assert torch.equal(expected.commit_step, ours.commit_step)
        programs.append(counters["stats"]["unique_graphs"])
    assert 0 < programs[0] <= (5 if cache == "dual" and rule else 10)
    assert programs == programs[:1] * 3
    assert not counters["graph_break"], "a layer is one program, its cache included"


@pytest.mark.long
def test_the_number_of_programs_does_not_grow_with_the_layers() -> None:
    programs = []
    for layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        plain, compiled = policy_of(layers), policy_of(layers)
        compiled.network.compile_layers("eager")
        prompts = open_prompts(torch.arange(30).view(5, 6), 12)
        decoder = Decoder(12, 4, 12, 1.0, stop_at_eos=False, cache="dual")
        expected, ours = (decoder(policy, prompts, 0) for policy in (plain, compiled))
        assert torch.equal(expected.completion_ids, ours.completion_ids)
        programs.append(counters["stats"]["unique_graphs"])
    assert programs[0] == programs[1]
