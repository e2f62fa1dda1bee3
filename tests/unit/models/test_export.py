"""Export: what others load is what was trained, in the published layout; the rest is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from spg import config
from spg.cli import evaluate, export
from spg.config import ConfigError
from spg.core.errors import InputError, RunError
from spg.evaluation.settings import merge_settings
from spg.models import base_weights
from spg.models import export as exporting
from spg.models.factory import build_policy
from spg.models.lora import LoRA, MergedTensor, add_adapter, merged_tensors
from spg.models.policy import Policy
from spg.models.qwen3 import Qwen3Diffusion, Qwen3DiffusionConfig
from spg.models.weights import load_checkpoint, load_published, load_weights
from spg.runs import directory as runs
from spg.runs.status import write_status
from tests.helpers import command, run, small_policy, train_here

SHORT = ("trainer.max_updates=4", "task.eval_size=4", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a short run that trained an adapter."""
    return train_here(tmp_path_factory.mktemp("runs") / "lora", *SHORT, "model.lora=default")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a short run that trained all weights."""
    return train_here(tmp_path_factory.mktemp("runs") / "full", *SHORT)


def exported(folder: Path, *overrides: str) -> Path:
    """Export in this process to `folder`."""
    export.job(config.compose("export", [f"output={folder}", *overrides]))
    return folder


def trained(directory: Path, name: str = "best") -> Policy:
    """Return the policy of a run as its checkpoint has it."""
    policy = build_policy(runs.read_config(directory))
    load_checkpoint(policy.network, directory / "checkpoints" / f"{name}.ckpt")
    return policy.eval()


def logits(network: Any) -> Tensor:
    ids = torch.randint(3, 28, (3, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.logits(network.hidden(ids))


def test_a_merged_folder_is_the_adapted_network(adapted: Path, tmp_path: Path) -> None:
    folder = exported(tmp_path / "merged", f"run={adapted}", "merge=true")
    tensors = load_file(folder / "model.safetensors")
    base = build_policy(config.compose("config", []))
    assert {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in base.network.state_dict().items()
    }, "the published names and no others"
    expected = logits(trained(adapted).network)
    assert not torch.allclose(logits(base.network), expected, atol=1e-2), "it has learned something"
    load_weights(base.network, folder / "model.safetensors")
    assert torch.allclose(logits(base.network), expected, atol=1e-5)
    for place in (folder, folder / "model.safetensors"):
        again = config.compose("config", [f"model.weights={place}"])
        assert torch.allclose(logits(build_policy(again).network), expected, atol=1e-5)


def test_the_configuration_and_the_tokenizer_are_in_it(adapted: Path, tmp_path: Path) -> None:
    folder = exported(tmp_path / "merged", f"run={adapted}", "merge=true")
    fields = json.loads((folder / "config.json").read_text())
    expected = {"model_type": "llada", "architectures": ["LLaDAModelLM"], "torch_dtype": "float32"}
    expected |= {"d_model": 64, "n_layers": 3, "n_kv_heads": 8, "vocab_size": 29, "embedding_size": 32}
    expected |= {"mask_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "weight_tying": False}
    assert expected.items() <= fields.items()
    own, read = build_policy(config.compose("config", [])).tokenizer, AutoTokenizer.from_pretrained(folder)
    text = "<answer>\n12*(3+4)=84</answer>"
    assert read.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False)
    assert (read.mask_token_id, read.eos_token_id, read.pad_token_id) == (2, 1, 0)
    assert read.decode(read.encode(text)) == text
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "weights can be read by whom the configuration can"


def test_what_the_card_says(adapted: Path, tmp_path: Path) -> None:
    write_status(adapted, arguments=["task=sudoku", "model.lora=default"])
    card = (exported(tmp_path / "merged", f"run={adapted}", "merge=true") / "README.md").read_text()
    summary = json.loads((adapted / "summary.json").read_text())
    base = base_weights.file_name(runs.read_config(adapted))
    for words in (
        f"Base model: `{base}`",
        "`python -m spg.train task=sudoku model.lora=default`",
        "Weights: `checkpoints/best.ckpt`, as trained",
        "a low-rank adapter (rank 16, alpha 32, released matrices), merged into the weights",
        f"| accuracy | {summary['accuracy.before']:.3f} (",
        f"| {summary['accuracy.after']:.3f} (",
        "that of the base model holds",
        f"python -m spg.evaluate model=tiny model.weights={tmp_path / 'merged'}",
    ):
        assert words in card
    last = (exported(tmp_path / "last", f"run={adapted}", "checkpoint=last") / "README.md").read_text()
    assert f"| {summary['accuracy.last']:.3f} (" in last
    settings = OmegaConf.load(tmp_path / "merged" / "training.yaml")
    assert settings.optimizer.lr == 1e-2
    write_status(adapted, state="interrupted")
    open_end = (exported(tmp_path / "open", f"run={adapted}") / "README.md").read_text()
    write_status(adapted, state="finished")
    assert "| accuracy |" not in open_end
    assert "the run is not finished" in open_end


@pytest.fixture(scope="module")
def published(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an export in several files."""
    folder = tmp_path_factory.mktemp("published") / "model"
    cfg = config.compose("export", [f"run={adapted}", "merge=true"])
    cfg.shard_mb = 0.2  # as if the model were larger
    cfg_of_run = runs.read_updated_config(str(adapted))
    export.export(cfg, cfg_of_run, adapted / "checkpoints" / "best.ckpt", folder)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return folder


def as_published(folder: Path, *overrides: str) -> Any:
    """Return the settings of an evaluation of a folder in the published layout."""
    lines = ["model=llada_8b", f"model.path={folder}", *overrides]
    return merge_settings(config.compose("evaluate", lines), lines)


def test_an_exported_folder_is_loaded_as_a_published_one(adapted: Path, published: Path) -> None:
    policy = build_policy(as_published(published, "model.dtype=float32"))
    expected = trained(adapted)
    assert torch.allclose(logits(policy.network), logits(expected.network), atol=1e-5)
    assert (policy.mask_id, policy.eos_id, policy.pad_id) == (
        expected.mask_id,
        expected.eos_id,
        expected.pad_id,
    )
    assert policy.encode("12+3=") == expected.encode("12+3=")


@pytest.mark.long
def test_from_a_published_folder_to_the_next(published: Path, tmp_path: Path) -> None:
    """The 8B's way: an adapter on frozen bfloat16 weights, merged into them and loaded again."""
    base = tmp_path / "base"
    shutil.copytree(published, base)
    fields = json.loads((base / "config.json").read_text())
    fields |= {"max_sequence_length": 77, "auto_map": {"AutoModel": "hub/name--x.Y", "AutoConfig": "x.Z"}}
    (base / "config.json").write_text(json.dumps(fields))
    model = ("model=llada_8b", f"model.path={base}", "task.prompt_style=bare")
    own = ("tuned=null", "tuned/task=null", "model.lora.r=4")  # not the sizes of the real one's runs
    directory = train_here(tmp_path / "run", *SHORT, *model, *own)
    folder = exported(tmp_path / "merged", f"run={directory}", "merge=true")
    parts = merged_tensors(trained(directory).network)
    found = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], part.value(torch.bfloat16)) for name, part in parts.items())
    assert any((found[name] != part.own).any() for name, part in parts.items())
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["torch_dtype"], fields["max_sequence_length"], fields["d_model"]) == ("bfloat16", 77, 64)
    assert fields["auto_map"] == {"AutoModel": "hub/name--x.Y"}, "code in a folder does not come along"
    with torch.no_grad():
        again = build_policy(as_published(folder)).network
        assert torch.equal(
            again.get_parameter("model.transformer.wte.weight"), found["model.transformer.wte.weight"]
        )
    settings = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    lines = [*model, f"adapter={directory / 'adapter'}", "task.eval_size=4", "split=test"]
    evaluate.start(merge_settings(config.compose("evaluate", lines), lines), tmp_path / "e")
    record = json.loads((tmp_path / "e" / "results.json").read_text())
    assert record["precision"] == "bfloat16 weights, computed in bf16-mixed"
    assert record["results"].keys() == {"adapter"}


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_products_are_added_in_float32_and_rounded_once(base: torch.dtype) -> None:
    policy = small_policy()
    policy.network.to(base)
    policy.adapt(LoRA(r=4, alpha=8, dropout=0.0, targets="all"))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.network.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3, generator=g)
    network: Any = policy.network
    layer = network.model.transformer.blocks[1].ff_out
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.float() + 2.0 * b.float() @ a.float()
    found = merged_tensors(network)["model.transformer.blocks.1.ff_out.weight"]
    assert found.own.dtype == base
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(found.value(dtype), expected.to(dtype))
    assert not torch.allclose(expected, layer.base_layer.weight.float(), atol=0.1)


def test_weights_are_written_as_another_type(adapted: Path, tmp_path: Path) -> None:
    tensors = load_file(exported(tmp_path / "a", f"run={adapted}", "merge=true") / "model.safetensors")
    folder = exported(tmp_path / "b", f"run={adapted}", "merge=true", "cast=bfloat16")
    rounded = load_file(folder / "model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in tensors.items())
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    alone = exported(tmp_path / "c", f"run={adapted}", "cast=bfloat16")
    found = load_file(alone / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_large_weights_are_shared_out_among_files(tmp_path: Path) -> None:
    network = small_policy().network
    tensors = merged_tensors(network)
    most = 12_000
    assert exporting.write_weights(tensors, tmp_path, None, most) == torch.float32
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state = network.state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in state.values())
    shards = {file: load_file(tmp_path / file) for file in files}
    for name, file in index["weight_map"].items():
        assert torch.equal(shards[file].pop(name), state[name])
    assert not any(shards.values()), "and nothing that the index does not name"


def test_no_file_is_larger_than_asked_unless_one_tensor_is(tmp_path: Path) -> None:
    sizes = {"a": 3, "b": 3, "c": 5, "d": 9, "e": 1, "f": 2}
    tensors = {name: MergedTensor(torch.arange(size, dtype=torch.float32)) for name, size in sizes.items()}
    exporting.write_weights(tensors, tmp_path, None, 24)
    files = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sorted(name for file in files for name in file) == sorted(sizes)
    held = [sum(map(len, file.values())) for file in files]
    assert all(size <= 6 or len(file) == 1 for size, file in zip(held, files, strict=True))


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    network[1].weight = network[0].weight
    assert list(merged_tensors(network)) == ["0.weight"]
    sizes = Qwen3DiffusionConfig(32, 2, 4, 2, 12, 48, vocab_size=40, rope_theta=100.0)
    own = Qwen3Diffusion(sizes)
    adapter = add_adapter(own, LoRA(r=3, alpha=6, dropout=0.0, targets="all"))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in own.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3, generator=g)
    exporting.write_weights(merged_tensors(own), tmp_path, None, 20_000)
    with torch.device("meta"):
        other = Qwen3Diffusion(sizes, seed=None)
    load_published(other, tmp_path, torch.float32, torch.device("cpu"))
    assert torch.allclose(logits(other), logits(own.eval()), atol=1e-5)
    assert other.head.weight is other.get_parameter("model.embed_tokens.weight")
    with adapter.disable_adapter():
        assert not torch.allclose(logits(other), logits(own), atol=1e-2)


def test_a_run_that_trained_all_weights(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_weights, "look_up", None)  # which need not be there
    folder = exported(tmp_path / "best", f"run={whole}")
    best = torch.load(whole / "checkpoints" / "best.ckpt")["state_dict"]
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == {name.removeprefix("policy.network.") for name in best}
    assert all(torch.equal(tensor, best[f"policy.network.{name}"]) for name, tensor in tensors.items())
    assert "all weights trained" in (folder / "README.md").read_text()
    for which in ("last", str(whole / "weights.safetensors"), str(whole / "checkpoints" / "last.ckpt")):
        last = exported(tmp_path / f"last-{len(which)}", f"run={whole}", f"checkpoint={which}", "merge=true")
        tensors = load_file(last / "model.safetensors")
        own = load_file(whole / "weights.safetensors")
        assert all(torch.equal(tensor, own[name]) for name, tensor in tensors.items())


def test_an_adapter_alone_needs_no_base(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(base_weights, "look_up", None)
        folder = exported(tmp_path / "adapter", f"run={adapted}")
    base = build_policy(config.compose("config", []))
    theirs = PeftModel.from_pretrained(base.network, str(folder)).eval()
    assert torch.allclose(logits(theirs.base_model.model), logits(trained(adapted).network), atol=1e-6)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base_weights.file_name(runs.read_config(adapted))
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)
    copy = exported(tmp_path / "copy", f"run={adapted}", f"checkpoint={adapted / 'adapter'}")
    pair = [load_file(path / "adapter_model.safetensors") for path in (adapted / "adapter", copy)]
    assert pair[0].keys() == pair[1].keys()
    assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())


def test_a_base_of_4_bits_is_not_merged_unasked(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = runs.read_updated_config(str(adapted))
    cfg.model.quantization = "nf4"
    monkeypatch.setattr(export, "read_updated_config", lambda path: cfg.copy())
    with pytest.raises(ConfigError, match=r"4-bit weights .*give merge=false .* or unquantized=true"):
        exported(tmp_path / "a", f"run={adapted}", "merge=true")
    assert (exported(tmp_path / "b", f"run={adapted}") / "adapter_config.json").is_file()
    folder = exported(tmp_path / "c", f"run={adapted}", "merge=true", "unquantized=true")
    assert OmegaConf.load(folder / "training.yaml").model.quantization == "nf4"
    assert (
        "trained on a 4-bit base, and merged into the base as published" in (folder / "README.md").read_text()
    )


def test_what_can_t_be_exported_is_refused(adapted: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    runs.write_config(runs.read_config(whole), tmp_path)
    for overrides, words in (
        ([f"run={tmp_path / 'none'}"], "is not the directory of a run"),
        ([f"run={adapted}", f"output={tmp_path / 'there'}"], "is there already; remove it, or give another"),
        ([f"run={tmp_path}"], r"has no checkpoints/best\.ckpt yet; train it first"),
        ([f"run={adapted}", "checkpoint=newest"], "neither best nor last, nor a .ckpt or"),
        ([f"run={adapted}", f"checkpoint={tmp_path}"], "nor a PEFT folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            exported(tmp_path / "out", *overrides[::-1])
    (tmp_path / "weights.safetensors").write_bytes((whole / "weights.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"has no checkpoints/best\.ckpt yet; give checkpoint=last"):
        exported(tmp_path / "out", f"run={tmp_path}")
    for directory, file, words in (
        (whole, adapted / "adapter", "holds an adapter, but the run has trained all weights"),
        (whole, adapted / "checkpoints" / "best.ckpt", "does not fit this model"),
        (adapted, whole / "weights.safetensors", "does not fit this model"),
    ):
        with pytest.raises(RunError, match=words):
            exported(tmp_path / "out", f"run={directory}", f"checkpoint={file}")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"can't be made .* give a folder that can be"):
        exported(tmp_path / "file" / "out", f"run={adapted}")
    assert not list(tmp_path.glob("out*")), "nothing is left of what was refused"


def test_a_mistake_on_the_command_line_is_answered() -> None:
    assert command("export")[-1] == "spg.export"
    assert "run must be given: run=...; --help says what it is" in run("export", check=False)
    assert "there is no key 'marge'" in run("export", "run=x", "marge=true", check=False)
