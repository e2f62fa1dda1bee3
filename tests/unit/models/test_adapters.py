"""Adapters: what they train, how they are saved, and the reference model that they leave in place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from spg import config
from spg.algorithms.estimators import ELBO, Mixture, Sandwich
from spg.algorithms.objectives.spg import SPG, divergence
from spg.cli import evaluate
from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.errors import Interrupted
from spg.core.types import UpdateBatch
from spg.evaluation import checkpoints
from spg.evaluation.settings import merge_settings
from spg.evaluation.tables import score_context
from spg.models.base_weights import file_name
from spg.models.factory import build_policy
from spg.models.lora import LoRA, SavedLoRA
from spg.models.policy import Policy
from spg.runs import directory as runs
from spg.runs.status import write_status
from spg.training.module import Training
from spg.training.nonfinite import find_culprits
from spg.training.update import ExactGradient
from tests import faults
from tests.helpers import comparable, run, same_run, small_policy, train_here
from tests.unit.algorithms.test_invariance import batch, training

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
    with pytest.raises(ValueError, match="is not a PEFT folder"):
        other.load_adapter(tmp_path)


def test_checkpoints_hold_the_adapter_alone(finished: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(finished / "checkpoints" / name)
        assert all("lora_" in key for key in checkpoint["state_dict"])
        states = checkpoint["optimizer_states"][0]["state"]
        assert len(states) == len(checkpoint["state_dict"])


@pytest.mark.long
def test_an_adapter_s_run_is_evaluated(finished: Path, tmp_path: Path) -> None:
    run("evaluate", f"run={finished}", folder=tmp_path / "e")
    results = json.loads((tmp_path / "e" / "results.json").read_text())["results"]
    summary = json.loads((finished / "summary.json").read_text())
    assert results["base"]["accuracy"] == summary["accuracy.before"]
    assert results["adapter"]["accuracy"] == summary["accuracy.last"]
    assert results["checkpoints/best.ckpt"]["accuracy"] == summary["accuracy.after"]


def evaluated(folder: Path, *overrides: str) -> dict[str, Any]:
    """Evaluate in this process and return what results.json holds."""
    lines = [*overrides, "task.eval_size=6", "threads=1"]
    evaluate.start(merge_settings(config.compose("evaluate", lines), lines), folder)
    return json.loads((folder / "results.json").read_text())


def test_an_adapter_s_folder_is_evaluated_by_its_own_numbers(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = evaluated(tmp_path / "run", f"run={finished}", "split=heldout")["results"]
    with caplog.at_level("WARNING"):
        given = (f"adapter={finished / 'adapter'}", "model.lora=paper")
        record = evaluated(tmp_path / "alone", *given)
    assert "model.lora is not read" in caplog.text
    assert "was trained on" not in caplog.text
    assert list(record["results"]) == ["adapter"], "its base is evaluated where no adapter is given"
    assert record["results"]["adapter"] == own["adapter"]
    assert record["results"]["adapter"]["accuracy"] != own["base"]["accuracy"]
    assert record["settings"]["adapter"] == str(finished / "adapter")
    assert (record["settings"]["lora"], record["selection"]) == (True, None)
    assert any(f"weights base, adapter {finished / 'adapter'}" in line for line in score_context(record))
    assert config.load_saved(tmp_path / "alone" / "config.yaml").model.lora.folder == str(
        finished / "adapter"
    )
    base = evaluated(tmp_path / "base", "model.lora=paper")
    assert base["results"]["base"] == own["base"]
    assert base["settings"]["lora"] is False, "what is not trained is not put in"


def test_an_evaluation_of_an_adapter_goes_on_with_the_same_one(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", folder)
    record = evaluated(tmp_path / "e", f"adapter={folder}")
    written = (tmp_path / "e" / "generations.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "e" / "generations.jsonl").write_text("".join(written[:5]))
    write_status(tmp_path / "e", state="interrupted")
    evaluate.resume(str(tmp_path / "e"), [])
    assert json.loads((tmp_path / "e" / "results.json").read_text()) == record
    write_status(tmp_path / "e", state="interrupted")
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match="made with another adapter"):
        evaluate.resume(str(tmp_path / "e"), [])


def test_an_adapter_of_another_s_making(tmp_path: Path) -> None:
    """With other matrices, ranks and scale than ours can have."""
    base = build_policy(config.compose("config", []))
    targets = ["q_proj", "attn_out"]
    settings = LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, use_rslora=True, rank_pattern={"q_proj": 2}
    )
    theirs = get_peft_model(base.network, settings)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3, generator=g)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    ours = build_policy(config.compose("config", []))
    ours.adapt(SavedLoRA(str(tmp_path / "theirs")))
    ids = torch.randint(5, 28, (3, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval().base_model.model.hidden(ids)
        assert torch.allclose(ours.eval().network.hidden(ids), expected, atol=1e-6)
    assert list(evaluated(tmp_path / "e", f"adapter={tmp_path / 'theirs'}")["results"]) == ["theirs"]


@pytest.mark.long
def test_a_folder_that_can_t_be_evaluated_is_refused_before_weights_are_read(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "build_policy", None)
    given = f"adapter={finished / 'adapter'}"
    for lines, words in (
        (
            [f"adapter={tmp_path}"],
            "is not a PEFT folder: it has no adapter_config.json; give the folder",
        ),
        ([f"adapter={finished}"], f"no adapter_config.json; give adapter={finished / 'adapter'}"),
        ([given, f"run={finished}"], "can't be given together"),
        ([given, "generations=x.jsonl"], "adapter=.* can't be given with generations"),
        (
            [given, "model.network.config.d_model=32"],
            r"lora_A\.weight is \(16, 64\) in it and \(16, 32\) here \(21 tensors differ\)",
        ),
        ([given, "model.network.config.n_layers=4"], r"blocks\.3\..* is missing in it"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluated(tmp_path / "e", *lines)
    copy = tmp_path / "copy"
    shutil.copytree(finished / "adapter", copy)
    for name, text, words in (
        ("adapter_model.safetensors", "no tensors", "is not a safetensors file"),
        ("adapter_model.safetensors", None, r"has no adapter_model\.safetensors"),
        ("adapter_config.json", '{"peft_type": "LOHA"}', "of kind LOHA can't be evaluated; only LORA"),
        ("adapter_config.json", "no JSON", "can't be read"),
    ):
        (copy / name).unlink()
        if text is not None:
            (copy / name).write_text(text)
        with pytest.raises(ConfigError, match=words):
            evaluated(tmp_path / "e", f"adapter={copy}")
        (copy / name).write_text("")
    assert not (tmp_path / "e" / "generations.jsonl").exists()


def test_another_base_than_an_adapter_s_own_is_told(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = json.loads((finished / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == file_name(runs.read_config(finished))
    with caplog.at_level("WARNING"):
        evaluated(tmp_path / "e", f"adapter={finished / 'adapter'}", "model.weights=random")
    assert f"was trained on {name}, and is evaluated on random weights" in caplog.text


@pytest.mark.long
def test_with_dropout_a_resumed_run_is_the_same(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        faults.interrupted("4", patch.setattr)
        with pytest.raises(Interrupted):
            train_here(folder, "model.lora=default", "optimizer.lr=1e-2")
    torch.manual_seed(12345)  # another process would have another global random state
    resume(str(folder), [])
    assert same_run(finished, folder)


def module_of(policy: Policy, kl_coef: float, micro_batch_size: int | None = None) -> Training:
    module = training(policy, "mixture", micro_batch_size)
    module.objective = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)), kl_coef=kl_coef)
    return module


def gradient(module: Training, seed: int = 0) -> tuple[float, Tensor, dict[str, Tensor]]:
    result = module.gradient.add(module.prepare_batch(*batch(seed)))
    found = [p.grad.flatten() for p in module.policy.parameters() if p.grad is not None]
    return float(result.loss), torch.cat(found), dict(result.figures)


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
    from spg.training.assembly import build_module

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
    plain = SPG(Sandwich(ELBO(), Mixture(1.5, 0.5)))(logps, UpdateBatch.of(experience, samples)).loss
    result = objective(logps, UpdateBatch.of(experience, samples, reference=reference))
    loss, figures = result.loss, result.figures
    shares = objective.coefficients(samples.lengths, experience.rollout.group)
    assert float(loss - plain) == pytest.approx(0.3 * float((shares * found).sum()), abs=1e-6)
    assert torch.equal(figures["kl"], found)
    with pytest.raises(ValueError, match="needs the reference model"):
        objective(logps, UpdateBatch.of(experience, samples))


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


def test_dropout_is_the_same_in_both_passes_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout the pieces have noise of their own, but a piece's two passes have the same."""
    seen: dict[int, list[Tensor]] = {}
    module = module_of(adapted(dropout=0.5), 0.0, 2)  # of three draws
    module.policy.train()
    original = ExactGradient.token_logps

    def spy(self, batch, piece):
        logps = original(self, batch, piece)
        seen.setdefault(int(piece.rows[0]) * 100 + int(piece.draws[0]), []).append(logps.detach())
        return logps

    monkeypatch.setattr(ExactGradient, "token_logps", spy)
    gradient(module)
    assert len(seen) > 1
    assert all(len(pair) == 2 and torch.equal(*pair) for pair in seen.values())


@pytest.mark.long
def test_rollouts_and_evaluation_have_no_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    original = Policy.propose

    def propose(policy: Policy, *rest, **more):
        modes.append(policy.training)
        return original(policy, *rest, **more)

    monkeypatch.setattr(Policy, "propose", propose)
    train_here(tmp_path / "run", "model.lora=default", "trainer.max_updates=5", "task.eval_size=4")
    assert modes
    assert not any(modes)


@pytest.mark.long
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
    found = find_culprits(experience, module.prepare_batch(experience, samples), module.gradient)
    assert found, "named, and not blamed on the weights"
