"""Adapters: what they train, how they are saved, and the reference model that they leave in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from spg import config, runs
from spg.adapters import LoRA
from spg.errors import Interrupted
from spg.estimators import ELBO, Mixture, Sandwich
from spg.module import Training
from spg.objectives.spg import SPG, divergence
from spg.policy import Policy
from spg.pretraining import build_policy
from tests import faults
from tests.helpers import comparable, run, same_run, small_policy, train_here
from tests.test_invariance import batch, training

RELEASED = {"q_proj", "k_proj", "v_proj", "up_proj"}
ALL = RELEASED | {"attn_out", "ff_proj", "ff_out"}


def adapted(targets: str = "released", dropout: float = 0.0, seed: int = 0) -> Policy:
    """Return a small policy with an adapter that is no longer the identity."""
    policy = small_policy()
    policy.adapt(LoRA(r=4, alpha=8, dropout=dropout, targets=targets, seed=seed))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=g)
    return policy


@pytest.mark.parametrize(("targets", "names"), [("released", RELEASED), ("all", ALL)])
def test_the_matrices_of_the_published_runs_or_all(targets: str, names: set[str]) -> None:
    trained = [name for name, p in adapted(targets).named_parameters() if p.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    parts = {(name.split(".blocks.")[1].split(".")[0], name.split(".")[-4]) for name in trained}
    assert parts == {(layer, name) for layer in "01" for name in names}, "no head, whose name is ff_out too"


def test_the_paper_s_adapter_changes_four_of_seven_matrices() -> None:
    policy = build_policy(config.compose("config", ["model.lora=paper"]))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    q = k = v = 64 + 64
    up = 64 + 192
    assert trained == 3 * 128 * (q + k + v + up)


def test_a_new_adapter_changes_nothing_and_derives_from_its_seed() -> None:
    plain, policies = small_policy(), [small_policy() for _ in range(3)]
    state = torch.get_rng_state()
    for policy, seed in zip(policies, (5, 5, 6), strict=True):
        policy.adapt(LoRA(4, 8, 0.0, "all", seed))
    assert torch.equal(state, torch.get_rng_state()), "the global random state is left alone"
    ids = torch.randint(5, 28, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.network.hidden(ids)
        assert all(torch.equal(policy.network.hidden(ids), expected) for policy in policies)
    first, second, other = (
        torch.cat([p.flatten() for n, p in policy.named_parameters() if "lora_A" in n]) for policy in policies
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a short run that trained an adapter, with dropout."""
    return train_here(tmp_path_factory.mktemp("runs") / "lora", "model.lora=default", "optimizer.lr=1e-2")


def test_a_run_leaves_an_adapter_that_peft_loads(finished: Path) -> None:
    assert not (finished / "weights.safetensors").exists()
    cfg = runs.read_config(finished)
    ours = build_policy(cfg)
    ours.load_adapter(finished / "adapter")
    plain = config.compose("config", [])
    theirs = PeftModel.from_pretrained(build_policy(plain).network, str(finished / "adapter")).eval()
    base = build_policy(plain)
    ids = torch.randint(5, 28, (3, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.base_model.model.hidden(ids)
        assert torch.allclose(ours.eval().network.hidden(ids), expected, atol=1e-6)
        assert not torch.allclose(base.network.hidden(ids), expected, atol=1e-2), "it has learned something"
    settings = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (16, 32, 0.05)


def test_an_adapter_that_does_not_fit_is_refused(finished: Path, tmp_path: Path) -> None:
    other = build_policy(config.compose("config", ["model.lora=default", "model.lora.r=8"]))
    with pytest.raises(ValueError, match=r"does not fit .* is \(16, 64\) in it and \(8, 64\)"):
        other.load_adapter(finished / "adapter")
    with pytest.raises(ValueError, match="is no PEFT folder"):
        other.load_adapter(tmp_path)


def test_checkpoints_hold_the_adapter_alone(finished: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(finished / "checkpoints" / name)
        assert all("lora_" in key for key in checkpoint["state_dict"])
        states = checkpoint["optimizer_states"][0]["state"]
        assert len(states) == len(checkpoint["state_dict"])


def test_an_adapter_s_run_is_evaluated(finished: Path, tmp_path: Path) -> None:
    run("evaluate", f"run={finished}", folder=tmp_path / "e")
    results = json.loads((tmp_path / "e" / "results.json").read_text())["results"]
    summary = json.loads((finished / "summary.json").read_text())
    assert results["base"]["accuracy"] == summary["accuracy.before"]
    assert results["adapter"]["accuracy"] == summary["accuracy.last"]
    assert results["checkpoints/best.ckpt"]["accuracy"] == summary["accuracy.after"]


def test_with_dropout_a_resumed_run_is_the_same(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        faults.interrupted("4", patch.setattr)
        with pytest.raises(Interrupted):
            train_here(folder, "model.lora=default", "optimizer.lr=1e-2")
    torch.manual_seed(12345)  # another process would have another global random state
    runs.resume(str(folder), [])
    assert same_run(finished, folder)


def module_of(policy: Policy, kl_coef: float, micro_batch_size: int | None = None) -> Training:
    module = training(policy, "mixture", micro_batch_size)
    module.objective = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)), kl_coef=kl_coef)
    module.manual_backward = lambda loss: loss.backward()
    return module


def gradient(module: Training, seed: int = 0) -> tuple[float, Tensor, dict[str, Tensor]]:
    loss, figures = module.backward_through(*batch(seed))
    found = [p.grad.flatten() for p in module.policy.parameters() if p.grad is not None]
    return float(loss), torch.cat(found), figures


def test_the_adapter_switched_off_is_the_reference() -> None:
    policy, base = adapted(dropout=0.5), small_policy()
    policy.train()
    ids = torch.randint(5, 28, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with policy.as_reference():
            assert torch.equal(policy.network.hidden(ids), base.network.hidden(ids))
        assert policy.training
        policy.eval()
        assert not torch.allclose(policy.network.hidden(ids), base.network.hidden(ids), atol=1e-2)


def test_a_frozen_copy_is_the_reference_in_full_fine_tuning() -> None:
    policy, base = small_policy(), small_policy()
    names = set(policy.state_dict())
    policy.keep_reference()
    assert set(policy.state_dict()) == names, "the copy is no part of what is saved"
    assert len(list(policy.parameters())) == len(list(base.parameters())), "nor of what is trained"
    ids = torch.randint(5, 28, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1)
        with policy.as_reference():
            assert torch.equal(policy.network.hidden(ids), base.network.hidden(ids))
        assert not torch.allclose(policy.network.hidden(ids), base.network.hidden(ids), atol=1e-2)


def test_a_reference_exists_only_where_an_objective_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Policy] = []
    monkeypatch.setattr(Policy, "keep_reference", lambda policy: kept.append(policy))
    from spg.training import build_module

    build_module(config.compose("config", []))
    assert kept == []
    build_module(config.compose("config", ["algorithm.objective.kl_coef=0.04"]))
    assert len(kept) == 1
    with pytest.raises(ValueError, match="no reference model was kept"), small_policy().as_reference():
        pass


def test_the_divergence_against_its_closed_form() -> None:
    experience, samples = batch(1)
    g = torch.Generator().manual_seed(0)
    logps, reference = (-3 * torch.rand(samples.scored.shape, generator=g) for _ in range(2))
    found = divergence(logps, reference, samples)
    for row in range(len(found)):
        ratio = (reference - logps)[row][samples.scored[row]].exp()
        expected = (ratio - ratio.log() - 1).mean()
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-6)
    assert not divergence(logps, logps, samples).any()
    objective = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)), kl_coef=0.3)
    plain, _ = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)))(logps, samples, experience)
    loss, figures = objective(logps, samples, experience, None, reference)
    shares = objective.coefficients(samples.lengths, experience.rollout.group)
    assert float(loss - plain) == pytest.approx(0.3 * float((shares * found).sum()), abs=1e-6)
    assert torch.equal(figures["kl"], found)
    with pytest.raises(ValueError, match="needs the reference model"):
        objective(logps, samples, experience)


@pytest.mark.parametrize("with_adapter", [True, False])
def test_micro_batches_change_no_gradient_with_a_reference(with_adapter: bool) -> None:
    results = []
    for micro_batch_size in (None, 5):
        policy = adapted("all") if with_adapter else small_policy()
        policy.keep_reference()
        if not with_adapter:
            with torch.no_grad():
                for p in policy.parameters():
                    p.add_(0.01)
        results.append(gradient(module_of(policy, 0.5, micro_batch_size)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)
    assert float(results[0][2]["kl"].mean()) > 1e-4
    assert torch.allclose(results[0][2]["kl"], results[1][2]["kl"], atol=1e-6)


def test_dropout_is_the_same_in_both_passes_of_a_piece() -> None:
    """With dropout the pieces have noise of their own, but a piece's two passes have the same."""
    seen: dict[int, list[Tensor]] = {}
    module = module_of(adapted(dropout=0.5), 0.0, 7)
    module.policy.train()
    original = module._token_logps

    def spy(experience, samples, piece):
        logps = original(experience, samples, piece)
        seen.setdefault(int(piece[0][0]) * 100 + int(piece[1][0]), []).append(logps.detach())
        return logps

    module._token_logps = spy
    gradient(module)
    assert len(seen) > 1
    assert all(len(pair) == 2 and torch.equal(*pair) for pair in seen.values())


def test_rollouts_and_evaluation_have_no_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    original = Policy.propose

    def propose(policy: Policy, *rest):
        modes.append(policy.training)
        return original(policy, *rest)

    monkeypatch.setattr(Policy, "propose", propose)
    train_here(tmp_path / "run", "model.lora=default", "trainer.max_updates=5", "task.eval_size=4")
    assert modes
    assert not any(modes)


def test_training_with_a_divergence_to_the_reference(tmp_path: Path) -> None:
    lines = ["algorithm.objective.kl_coef=0.1", "trainer.max_updates=4", "task.eval_size=4"]
    for name, more in (("full", []), ("lora", ["model.lora=default"])):
        folder = train_here(tmp_path / name, *lines, *more)
        rows = comparable(folder)
        assert float(rows[-1]["kl"]) > 0


def test_a_divergence_that_overflows_names_its_sequences() -> None:
    policy = small_policy()
    policy.keep_reference()
    with torch.no_grad():
        policy.network.get_parameter("model.transformer.ff_out.weight").mul_(1e4)
    module = module_of(policy, 1.0)
    experience, samples = batch(0)
    loss, _, _ = gradient(module)
    assert loss == float("inf")
    found = module.culprits(experience, samples)
    assert found, "named, and not blamed on the weights"
