"""Adapters while a policy decodes: fused products that give the same, and what is as before afterwards."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from spg.algorithms.advantages import GroupMean
from spg.evaluation.completer import Completer
from spg.evaluation.evaluator import Item
from spg.models.lora import FusedLayer, LoRA
from spg.models.policy import Policy
from spg.rollout.collect import collect
from spg.rollout.decoder import Decoder
from spg.tasks.sudoku import Sudoku
from tests.helpers import open_prompts, small_policy

IDS = torch.randint(5, 28, (3, 12), generator=torch.Generator().manual_seed(0))
SCORED = torch.ones(3, 6, dtype=torch.bool)


def adapted(alpha: int = 8, precision: str = "32-true", own: torch.dtype = torch.float32) -> Policy:
    """Return a small policy, in training mode, with an adapter with dropout that is not the identity."""
    plain = small_policy()
    policy = Policy(plain.network.to(own), plain.tokenizer, precision)
    policy.adapt(LoRA(r=4, alpha=alpha, dropout=0.5, targets="all"))
    change(policy, 1)
    return policy.train()


def change(policy: Policy, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=g)


def logps(policy: Policy) -> Tensor:
    return policy.token_logps(IDS, None, IDS[:, -6:], SCORED)


def as_peft(policy: Policy) -> Tensor:
    """Return the log-probabilities by peft's own forward pass, without dropout."""
    policy.eval()
    with torch.no_grad():
        found = logps(policy)
    policy.train()
    return found


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("alpha", [8, 6])
def test_a_fused_adapter_gives_the_same(alpha: int) -> None:
    """Bit for bit if alpha / r is a power of two, as in all shipped settings."""
    policy = adapted(alpha)
    expected = as_peft(policy)
    with policy.decoding():
        assert not policy.training
        found = logps(policy)
        assert not found.requires_grad
    assert policy.training
    if alpha == 8:
        assert torch.equal(found, expected)
    assert torch.allclose(found, expected, atol=1e-6)


def test_all_is_as_before_afterwards_and_after_a_mistake_too() -> None:
    policy = adapted()
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    kept = {name: dict(vars(module)) for name, module in policy.named_modules()}
    expected = as_peft(policy)
    with pytest.raises(KeyError), policy.decoding():
        raise KeyError
    with policy.decoding():
        with policy.decoding():
            pass
        assert torch.equal(logps(policy), expected), "the inner block ends nothing"
    assert policy.training
    for name, module in policy.named_modules():
        assert vars(module).keys() == kept[name].keys(), name
    assert policy.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
    assert all(one.down is None and one.up is None for one in policy._fused)
    policy.eval()
    found = logps(policy)
    assert torch.equal(found, expected)
    found.sum().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_it_is_the_adapter_of_the_moment_and_off_for_the_reference() -> None:
    policy = adapted()
    for seed in (1, 2):
        change(policy, seed)
        expected = as_peft(policy)
        with policy.decoding():
            assert torch.equal(logps(policy), expected), "what an optimizer's step made of it"
            with policy.as_reference():
                assert torch.equal(logps(policy), logps(small_policy()))
            assert not policy.training
            assert torch.equal(logps(policy), expected)


def test_in_lower_precision_it_rounds_less() -> None:
    """A float32 network of the same rounded weights says what is right."""
    policy = adapted(6, "bf16-mixed", torch.bfloat16)
    exact = copy.deepcopy(policy)
    exact.network.float()
    exact.precision = "32-true"
    right, theirs = as_peft(exact), as_peft(policy)
    with Operations() as peft, torch.no_grad():
        policy.eval()
        logps(policy)
    with policy.decoding(), Operations() as fused:
        ours = logps(policy)
    assert float((ours - right).abs().mean()) < 1.1 * float((theirs - right).abs().mean())
    layers = len(policy._fused)
    assert layers == 14
    assert fused.found["addmm_"] == layers
    # peft: both matrices cast, the product scaled and added
    assert peft.found["_to_copy"] - fused.found["_to_copy"] == 2 * layers
    assert peft.found["mul"] - fused.found["mul"] == layers
    assert peft.found["add"] - fused.found["add"] == layers


def test_without_autocast_layers_of_another_type_keep_peft_s_pass() -> None:
    policy = adapted(8, "32-true", torch.bfloat16)
    expected = as_peft(policy)
    with policy.decoding():
        assert not any("forward" in vars(one.layer) for one in policy._fused)
        assert torch.equal(logps(policy), expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("more", "fused"), [({}, 8), ({"use_dora": True}, 0), ({"lora_bias": True}, 0)])
def test_a_layer_that_is_more_than_a_product_is_left_alone(more: dict[str, bool], fused: int) -> None:
    network = small_policy().network
    settings = LoraConfig(r=4, target_modules=network.lora_targets["released"], **more)
    assert len(FusedLayer.of(get_peft_model(network, settings))) == fused


def test_rollouts_and_evaluation_fuse_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = FusedLayer.forward

    def spy(layer: FusedLayer, x: Tensor) -> Tensor:
        calls.append(len(x))
        return original(layer, x)

    monkeypatch.setattr(FusedLayer, "forward", spy)
    policy, task = adapted(), Sudoku(train_size=4, eval_size=4)
    examples = task.examples("train")[:2]
    for cache in ("none", "dual"):
        decoder = Decoder(24, 12, 4, 0.9, cache=cache)
        experience, _ = collect(policy, decoder, task, GroupMean(), examples, 2, seed=0)
        assert calls
        calls.clear()
        assert policy.training
        completed = Completer(policy, decoder, task)([Item(0, 0, examples[0])])
        assert calls
        assert len(completed) == 1
        monkeypatch.setattr(policy, "_fused", [])
        again, _ = collect(policy, decoder, task, GroupMean(), examples, 2, seed=0)
        monkeypatch.undo()
        monkeypatch.setattr(FusedLayer, "forward", spy)
        assert torch.equal(experience.rollout.completion_ids, again.rollout.completion_ids)
        assert torch.equal(experience.rollout.commit_logps, again.rollout.commit_logps)
        calls.clear()


def test_inputs_of_an_adapter_are_not_cast_to_float32_and_back() -> None:
    """With peft's casts the log-probabilities and gradients are the same, and the copies more."""
    results = []
    for casts in (True, False):
        policy = adapted(8, "bf16-mixed", torch.bfloat16)
        for one in policy._fused:
            assert not one.layer.cast_input_dtype_enabled
            one.layer.cast_input_dtype_enabled = casts
            one.layer.lora_dropout["default"].p = 0.0
        with Operations() as operations:
            found = logps(policy)
            found.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        results.append((found.detach(), gradient, operations.found["_to_copy"]))
    (logps_with, gradient_with, copies_with), (found, gradient, copies) = results
    assert torch.equal(found, logps_with)
    assert torch.equal(gradient, gradient_with)
    # there and back, in both directions; the first layer's inputs have no gradient
    assert copies_with - copies == 4 * 14 - 2 * 3
    assert all(one.layer.cast_input_dtype_enabled for one in adapted()._fused), "in float32 there are none"


@pytest.mark.long
def test_a_second_rollout_compiles_nothing() -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = adapted(), adapted()
    compiled.network.compile_layers("eager")
    prompts = open_prompts(torch.randint(5, 28, (4, 6)), 12)
    decoder = Decoder(12, 4, 12, 1.0, stop_at_eos=False, cache="dual")
    graphs = []
    for seed in range(3):
        change(plain, seed)
        change(compiled, seed)
        with plain.decoding(), compiled.decoding():
            expected, found = (decoder(policy, prompts, seed) for policy in (plain, compiled))
        assert torch.equal(found.completion_ids, expected.completion_ids)
        logps(compiled).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[2] == graphs[0]
    torch._dynamo.reset()
