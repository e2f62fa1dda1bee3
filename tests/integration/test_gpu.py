"""What needs a CUDA device: `pytest -m gpu`. Skipped, saying so, where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from spg import config
from spg.core.seeding import Streams
from spg.core.types import Prompts
from spg.models import head
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.lora import LoRA
from spg.models.policy import Policy
from spg.rollout.decoder import Decoder, logp_difference
from tests.helpers import Ids, golden_policy, open_prompts
from tests.unit.algorithms.test_invariance import batch
from tests.unit.models.test_lean import frozen_head, gradient, updating, whole
from tests.unit.models.test_qwen3 import small as small_qwen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


def on_gpu(record: Any) -> Any:
    """Return a record of tensors with these on the GPU."""
    moved = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.cuda()
        elif hasattr(value, "__dataclass_fields__"):
            moved[field.name] = on_gpu(value)
    return replace(record, **moved)


def prompts() -> Prompts:
    ids = torch.arange(54).view(6, 9)
    return open_prompts(ids, 16, torch.arange(9) >= torch.tensor([0, 0, 2, 2, 5, 1])[:, None])


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_greedy_decoding_is_that_of_the_cpu(cache: str) -> None:
    decoder = Decoder(16, 4, 8, cache=cache)
    here = decoder(golden_policy(), prompts())
    there = decoder(golden_policy().cuda(), on_gpu(prompts()))
    assert torch.equal(here.completion_ids, there.completion_ids.cpu())
    assert torch.equal(here.commit_step, there.commit_step.cpu())


def test_random_draws_are_those_of_the_cpu() -> None:
    index = torch.arange(5)
    assert torch.equal(Streams(3, index).uniform(7), Streams(3, index.cuda()).uniform(7).cpu())


def qwen() -> Policy:
    """Return a policy on Qwen3's layers."""
    return Policy(small_qwen(vocab_size=131), Ids(mask=126, eos=120, pad=120))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("made", [golden_policy, qwen])
def test_steps_do_not_wait_for_the_gpu(
    cache: str, temperature: float, made: Callable[[], Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = Decoder._step, []

    def step(self: Decoder, *args: Any, shared: bool, **more: Any) -> None:
        torch.cuda.set_sync_debug_mode("default" if shared else "error")
        try:
            original(self, *args, shared=shared, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(shared)

    monkeypatch.setattr(Decoder, "_step", step)
    Decoder(16, 4, 8, temperature, stop_at_eos=False, cache=cache)(made().cuda(), on_gpu(prompts()), 0)
    assert steps == [True] + [False] * 7


@pytest.mark.parametrize("trained", [whole, frozen_head])
@pytest.mark.parametrize("few", [0, head.FEW])
def test_the_update_is_that_of_the_cpu(
    few: int, trained: Callable[[Policy], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "FEW", few)
    objective = config.build(config.compose("config", []).algorithm.objective)
    experience, samples = batch(1)
    found = []
    for move in (False, True):
        network = LLaDA(LLaDAConfig(32, 2, 2, 2, 48, vocab_size=131, embedding_size=131))
        policy = Policy(network, Ids(mask=126, eos=120, pad=120))
        trained(policy)
        if move:
            policy.cuda()
            experience, samples = on_gpu(experience), on_gpu(samples)
        module = updating(policy, objective, 5)
        loss = module.gradient.add(module.prepare_batch(experience, samples)).loss
        found.append((float(loss), gradient(policy).cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4 * float(found[0][1].abs().max()))


def middling(precision: str = "bf16-mixed") -> Policy:
    """Return a bfloat16 policy with an adapter, a wide head and recomputed layers."""
    sizes = LLaDAConfig(512, 8, 8, 8, 1536, vocab_size=32000, embedding_size=32000)
    network = LLaDA(sizes).cuda().to(torch.bfloat16)
    network.checkpointing = True
    policy = Policy(network, Ids(mask=126, eos=120, pad=120), precision)
    policy.adapt(LoRA(16, 32, 0.0, "released"))
    return policy


def test_many_draws_need_the_memory_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """m = 16 in pieces of one masked sequence takes what m = 1 takes, but for the small [B M T] tensors."""
    monkeypatch.setattr(head, "FEW", 0)
    objective = config.build(config.compose("config", []).algorithm.objective)
    peaks = []
    for num_mc in (1, 16):
        policy = middling()
        experience, samples = (on_gpu(part) for part in batch(1))
        copies = torch.arange(num_mc).remainder(samples.scored.shape[1]).cuda()
        samples = replace(
            samples,
            **{name: getattr(samples, name)[:, copies] for name in ("tokens", "scored", "weight")},
        )
        module = updating(policy, objective, 1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        module.gradient.add(module.prepare_batch(experience, samples))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.05 * peaks[0]


def test_a_frozen_head_in_bfloat16_has_the_gradient_of_kept_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, generator=g, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 64, generator=g, device="cuda", dtype=torch.bfloat16) * 0.3
    targets = torch.randint(0, 32000, (300,), generator=g, device="cuda")
    gradients = []
    for few in (10**9, 0):
        monkeypatch.setattr(head, "FEW", few)
        (gradient,) = torch.autograd.grad(head.token_logps(hidden, weight, targets).sum(), hidden)
        gradients.append(gradient.float())
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 0.02


def test_bfloat16_decodes_and_tells_what_a_cache_changes() -> None:
    policy = middling().eval()
    rollout = Decoder(16, 4, 8, 0.9, cache="dual")(policy, on_gpu(prompts()), 0)
    assert rollout.completion_ids.shape == (6, 16)
    assert float(logp_difference(policy, rollout, 0).max()) < 10


def test_compiled_layers_give_the_same() -> None:
    policy = golden_policy().cuda()
    ids = torch.arange(48).view(2, 24).cuda()
    with torch.no_grad():
        expected = policy.network.hidden(ids)
        policy.network.compile_layers()
        found = policy.network.hidden(ids)
    assert torch.allclose(found, expected, atol=1e-4)
