"""Published models: a folder in the published layout loads natively, and what is wrong with one is named."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spg import config
from spg.cli.train import resume, start
from spg.config import ConfigError
from spg.core.errors import InputError
from spg.core.hub import PATIENCE, hub_answers
from spg.evaluation.settings import merge_settings
from spg.models import hub, weights
from spg.models.base_weights import fingerprint_settings
from spg.models.factory import build_policy
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.quantization import check_nf4
from spg.models.tokenizer import byte_tokenizer
from spg.models.weights import list_tensors, load_published, load_weights, save_weights
from spg.runs import directory as runs
from spg.runs.identity import identity
from spg.training.pretraining import pretrain
from tests.helpers import QUICK, comparable, same_run

SIZES = LLaDAConfig(32, 2, 4, 2, 48, vocab_size=262, embedding_size=272, rope_theta=1000.0)
SOURCE = LLaDA(SIZES, seed=5)
# fields of a published config.json that are no sizes
FIELDS = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "input_emb_norm": False,
    "attention_layer_norm": False,
    "mask_token_id": 258,
    "eos_token_id": 257,
    "max_sequence_length": 4096,
}
SHARD = "model-0000{}-of-00003.safetensors"
WTE = "model.transformer.wte.weight"


def publish(folder: Path) -> Path:
    """Write the source network as LLaDA is published: three shards with an index, config.json, tokenizer."""
    folder.mkdir()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in SOURCE.state_dict().items()}
    places = {name: SHARD.format(1 + number % 3) for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(FIELDS | vars(SIZES)))
    byte_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    del told["mask_token"]
    file.write_text(json.dumps(told | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder that no test changes."""
    return publish(tmp_path_factory.mktemp("published") / "llada")


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """What `model=llada_8b` composes to, in a run on CPU."""
    return config.compose("config", ["model=llada_8b", "trainer.accelerator=cpu"])


def settings(composed: DictConfig, folder: Path | str, **model: Any) -> DictConfig:
    """Return a configuration with a published folder as model.path, and other settings of the model."""
    cfg = composed.copy()
    cfg.model.path = str(folder)
    for key, value in model.items():
        OmegaConf.update(cfg, f"model.{key}", value)
    return cfg


def changed(fields: Path, **others: Any) -> None:
    """Change fields of a JSON file."""
    fields.write_text(json.dumps(json.loads(fields.read_text()) | others))


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def meta(seed: None = None) -> LLaDA:
    """Return a network of the right sizes without storage."""
    with torch.device("meta"):
        return LLaDA(SIZES, seed=seed)


CPU = torch.device("cpu")


def test_the_logits_are_those_of_the_network_it_was_made_from(composed: DictConfig, folder: Path) -> None:
    cfg = hub.settle(settings(composed, folder, lora=None, precision="32-true"))
    policy = build_policy(cfg).eval()
    ids = torch.randint(0, 262, (3, 20), generator=torch.Generator().manual_seed(0))
    source = LLaDA(SIZES, seed=None)
    source.load_state_dict({n: t.to(torch.bfloat16).float() for n, t in SOURCE.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(
            policy.network.logits(policy.network.hidden(ids)), source.logits(source.hidden(ids))
        )
    assert {p.dtype for p in policy.network.parameters()} == {torch.float32}, "what is trained is float32"
    assert all(p.requires_grad for p in policy.network.parameters())
    assert (policy.mask_id, policy.eos_id, policy.pad_id) == (258, 257, 257)
    asked = policy.encode([{"role": "user", "content": "1+1?"}])
    assert policy.tokenizer.decode(asked).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_what_is_frozen_stays_small_and_what_is_trained_is_float32(
    composed: DictConfig, folder: Path
) -> None:
    policy = build_policy(hub.settle(settings(composed, folder, checkpointing=True)))
    types = {name: p.dtype for name, p in policy.network.named_parameters()}
    assert {dtype for name, dtype in types.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if "lora_" not in name} == {torch.bfloat16}
    assert {n for n, p in policy.network.named_parameters() if p.requires_grad} == {
        n for n in types if "lora_" in n
    }
    assert policy.precision == "bf16-mixed"
    assert policy.network.checkpointing


def test_a_single_file_and_a_file_of_weights_load_too(
    composed: DictConfig, folder: Path, tmp_path: Path
) -> None:
    tensors = {
        name: tensor for n in (1, 2, 3) for name, tensor in load_file(folder / SHARD.format(n)).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    network = meta()
    assert load_published(network, tmp_path, torch.float32, CPU) == 1
    assert torch.equal(network.model.transformer.wte.weight, tensors[WTE].float())
    cfg = hub.settle(settings(composed, folder))
    cfg.model.weights = str(tmp_path / "model.safetensors")
    assert build_policy(cfg).network.model.transformer.wte.weight.dtype == torch.bfloat16


def test_sizes_come_from_the_folder(
    composed: DictConfig, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    with caplog.at_level(logging.INFO):
        cfg = hub.settle(settings(composed, folder.name))
    assert LLaDAConfig(**{k: v for k, v in cfg.model.network.config.items() if k != "_target_"}) == SIZES
    assert cfg.model.path == str(folder), "absolute, for a run that goes on from elsewhere"
    assert "d_model=32 (not 4096)" in caplog.text
    assert "rms_norm_eps" not in caplog.text, "what is the same is not told"
    assert composed.model.network.config.d_model == 4096
    assert hub.settle(composed) is composed, "a hub id is looked at when it is loaded"


def test_sizes_that_others_imply(composed: DictConfig, tmp_path: Path) -> None:
    folder = publish(tmp_path / "llada")
    changed(folder / "config.json", n_kv_heads=None, mlp_hidden_size=None, mlp_ratio=2, embedding_size=None)
    sizes = hub.settle(settings(composed, folder)).model.network.config
    assert (sizes.n_kv_heads, sizes.mlp_hidden_size, sizes.embedding_size) == (4, 64, 262)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_type", "gelu"),
        ("weight_tying", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("rope", False),
        ("layer_norm_type", "low_precision"),
        ("alibi", True),
        ("block_type", "sequential"),
        ("input_emb_norm", True),
        ("attention_layer_norm", True),
        ("model_type", "llama"),
    ],
)
def test_another_kind_of_model_is_refused(
    composed: DictConfig, folder: Path, tmp_path: Path, field: str, value: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | vars(SIZES) | {field: value}))
    with pytest.raises(
        ConfigError, match=rf"config\.json describes another model than LLaDA: {field}={value}"
    ):
        hub.settle(settings(composed, tmp_path))


def test_a_config_that_is_none_is_named(composed: DictConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(
        ConfigError, match=r"is not a config\.json of LLaDA: it has no d_model, n_layers, n_heads"
    ):
        hub.settle(settings(composed, tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json can't be read"):
        hub.settle(settings(composed, tmp_path))


def test_a_hub_id_of_other_sizes_or_another_mask_is_refused(
    composed: DictConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = folder
    monkeypatch.setattr("spg.models.factory.fetch", lambda *given: there)
    monkeypatch.setattr("spg.models.tokenizer.fetch", lambda *given: there)
    with pytest.raises(ConfigError, match=r"config\.d_model=4096, but .* of some/model says 32; give .*=32"):
        build_policy(settings(composed, "some/model"))
    there = publish(tmp_path / "llada")
    changed(there / "config.json", mask_token_id=259)
    cfg = hub.settle(settings(composed, there))
    with pytest.raises(ConfigError, match=r"says mask_token_id=259, and the tokenizer's mask is .*\(258\)"):
        build_policy(cfg)


def test_a_hub_that_is_away_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    hub_answers.cache_clear()

    def away(*given: Any, **named: Any) -> None:
        asked.append(named)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", away)
    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    with pytest.raises(
        InputError, match=r"owner/model \(model\.revision=v1\) can't .* no copy .* model\.path=<folder>"
    ):
        hub.fetch("owner/model", "v1", hub.WEIGHTS)
    assert asked[0]["timeout"] == PATIENCE
    assert asked[1]["local_files_only"], "what is cached is looked for at once"
    assert asked[1]["allow_patterns"] == list(hub.WEIGHTS)


# what is done to a folder, and what is said of it
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda f: (
            rewrite(f / SHARD.format(1), lambda t: t.pop(WTE)),
            unlisted(f, WTE),
        ),
        r"1 \(model\.transformer\.wte\.weight \(272, 32\)\) of 21 of the model's tensors are missing",
    ),
    "extra": (
        lambda f: (
            rewrite(f / SHARD.format(2), lambda t: t.update(x=torch.zeros(3), y=torch.zeros(1))),
            listed(f, x=SHARD.format(2), y=SHARD.format(2)),
        ),
        r"2 \(x \(3,\) in model-00002-of-00003\.safetensors, y \(1,\) .*\) of 23 of its tensors",
    ),
    "shape": (
        lambda f: rewrite(f / SHARD.format(1), lambda t: t.update({WTE: torch.zeros(271, 32)})),
        r"1 \(model\.transformer\.wte\.weight is \(271, 32\) in .*00001.* and \(272, 32\) in the model\)",
    ),
    "several": (
        lambda f: [
            rewrite(f / SHARD.format(n), lambda t: t.update({k: torch.zeros(7) for k in t}))
            for n in (1, 2, 3)
        ],
        r"21 \(.*, \.\.\.\) of 21 tensors are of another shape",
    ),
    "shard": (
        lambda f: (f / SHARD.format(2)).unlink(),
        r"names 1 \(model-00002-of-00003\.safetensors\) of 3 files that are not there; get the files",
    ),
    "index of another": (
        lambda f: rewrite(f / SHARD.format(1), lambda t: t.pop(WTE)),
        rf"00001-of-.* is not the file that .* 1 tensors differ, first {WTE}, which is not in it",
    ),
    "file cut off": (
        lambda f: os.truncate(f / SHARD.format(3), 5000),
        r"00003-of-00003\.safetensors is not a safetensors file, or not a whole one",
    ),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        r"index\.json can't be read",
    ),
    "elsewhere": (
        lambda f: listed(f, x="../model.safetensors"),
        r"index\.json can't be read .*not a file of the folder",
    ),
    "nothing": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        r"has neither model\.safetensors nor model\.safetensors\.index\.json; give a folder",
    ),
    "quantised": (
        lambda f: rewrite(
            f / SHARD.format(1), lambda t: t.update({WTE: torch.zeros(272, 32, dtype=torch.int8)})
        ),
        r"wte\.weight is int8: weights that others have quantized can't be read",
    ),
}


def listed(folder: Path, **places: str) -> None:
    """Add tensors to a folder's index."""
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": json.loads(file.read_text())["weight_map"] | places}))


def unlisted(folder: Path, name: str) -> None:
    """Take a tensor out of a folder's index."""
    file = folder / "model.safetensors.index.json"
    places = json.loads(file.read_text())["weight_map"]
    del places[name]
    file.write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_folder_is_named(case: str, tmp_path: Path) -> None:
    folder = publish(tmp_path / "llada")
    damage, words = BROKEN[case]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        load_published(meta(), folder, torch.float32, CPU)


def test_a_tensor_is_read_once_and_one_file_is_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    opened: list[int] = [0]
    real = weights.safe_open

    class Watched:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    @contextmanager
    def watched(*given: Any, **named: Any) -> Iterator[Watched]:
        opened[0] += 1
        assert opened[0] == 1, "one at a time"
        with real(*given, **named) as file:
            yield Watched(file)
        opened[0] -= 1

    monkeypatch.setattr(weights, "safe_open", watched)
    network = meta()
    assert load_published(network, folder, torch.bfloat16, CPU) == 3
    assert sorted(read) == sorted(SOURCE.state_dict())
    read.clear()
    list_tensors(folder)
    assert not read, "looking at a folder reads none"


def test_the_weights_outlive_the_files(tmp_path: Path) -> None:
    folder = publish(tmp_path / "llada")
    network = meta()
    load_published(network, folder, torch.bfloat16, CPU)  # the type of the files
    for file in folder.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))  # in place, as a download would
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, SOURCE.state_dict()[name].to(torch.bfloat16)), name


class Tied(nn.Module):
    """A network whose head is its embedding, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize("names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
def test_tied_tensors_count_as_one_and_stay_tied(names: list[str], tmp_path: Path) -> None:
    matrix = torch.randn(6, 4)
    tensors = {name: matrix.clone() for name in names}
    file = tmp_path / "model.safetensors"
    save_file(tensors | {"scale": torch.full((1,), 3.0)}, file)
    with torch.device("meta"):
        network = Tied()
    load_published(network, tmp_path, torch.float32, CPU)
    assert network.head.weight is network.embed.weight
    assert torch.equal(network.head.weight, matrix)
    assert network.scale.item() == 3.0
    save_weights(network, tmp_path / "saved.safetensors", {})
    assert sorted(load_file(tmp_path / "saved.safetensors")) == ["embed.weight", "scale"]
    other = Tied()
    load_weights(other, tmp_path / "saved.safetensors")
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, matrix)
    save_file({"scale": torch.ones(1), "embed.weight": matrix, "head.weight": matrix + 1}, file)
    with torch.device("meta"):
        another = Tied()
    with pytest.raises(
        ValueError, match=r"head\.weight differs from embed\.weight.*tie_word_embeddings=false"
    ):
        load_published(another, tmp_path, torch.float32, CPU)
    save_file({"scale": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"1 \(embed\.weight \(6, 4\)\) of 2 .* missing"):
        load_published(network, tmp_path, torch.float32, CPU)


def test_random_weights_derive_from_the_seed_of_base_weights(composed: DictConfig) -> None:
    cfg = config.compose("config", ["model=llada_toy", "model/lora=default", "trainer.accelerator=cpu"])
    network = build_policy(cfg).network
    parameters = dict(network.named_parameters())
    sizes = LLaDAConfig(**{k: v for k, v in cfg.model.network.config.items() if k != "_target_"})
    assert 2e5 < sum(p.numel() for p in LLaDA(sizes).parameters()) < 5e5
    for seed in (0, 3):
        cfg.pretrain.seed = seed
        again = dict(build_policy(cfg).network.named_parameters())
        same = [torch.equal(parameters[n], p) for n, p in again.items() if "lora_" not in n and p.ndim == 2]
        assert all(same) if seed == 0 else not any(same)
    assert torch.equal(parameters[WTE], LLaDA(sizes, seed=0).model.transformer.wte.weight)


def test_settings_that_contradict_each_other_are_refused(composed: DictConfig, folder: Path) -> None:
    wrong = [
        ({"weights": "base"}, "base weights are made here, and this model is published"),
        ({"path": None}, "model.weights=published needs model.path"),
        ({"quantization": "nf4", "lora": None}, "needs an adapter"),
        ({"quantization": "nf4"}, "needs a CUDA device, not trainer.accelerator=cpu"),
        ({"quantization": "nf3"}, "allowed: one of: nf4, or null"),
        ({"dtype": "float16"}, "allowed: one of: float32, bfloat16"),
        ({"precision": "16-mixed"}, "allowed: one of: 32-true, bf16-mixed"),
    ]
    for model, words in wrong:
        with pytest.raises(ConfigError, match=words):
            config.check(settings(composed, folder, **model))
    with pytest.raises(ConfigError, match=r"this model is published .*model=tiny, or model=llada_toy"):
        pretrain(settings(composed, folder), folder)


def test_base_weights_do_not_depend_on_how_a_model_is_kept(composed: DictConfig) -> None:
    assert set(fingerprint_settings(composed)["model"]) == {"network", "tokenizer"}


def test_nf4_is_not_for_base_weights() -> None:
    with pytest.raises(ConfigError, match="is for published models"):
        config.compose("config", ["model.lora=default", "model.quantization=nf4"])


def test_nf4_away_from_cuda_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"nf4 needs a CUDA device .*this is cpu.* model\.quantization=null"):
        check_nf4(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nf4_is_close_to_the_whole_weights(composed: DictConfig, folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'spg[nf4]'")
    cfg = settings(composed, folder)
    cfg.trainer.accelerator = "auto"
    whole, small = (
        build_policy(hub.settle(settings(cfg, folder, quantization=kind))).eval() for kind in (None, "nf4")
    )
    ids = torch.randint(0, 262, (3, 20), device=whole.device)
    with torch.no_grad():
        ours, theirs = (p.network.logits(p.network.hidden(ids)).float().flatten() for p in (small, whole))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9
    parameters = dict(small.network.named_parameters())
    matrix = next(p for name, p in parameters.items() if "ff_proj" in name)
    assert matrix.dtype == torch.uint8
    assert parameters[WTE].dtype == parameters["model.transformer.ff_out.weight"].dtype == torch.bfloat16
    mask = torch.ones_like(ids, dtype=torch.bool)
    small.token_logps(ids, mask, ids[:, 10:], mask[:, 10:]).sum().backward()
    trained = [p for p in small.network.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained)


SHORT = (
    "model=llada_8b",
    "tuned=null",
    "tuned/task=null",
    "task.prompt_style=bare",
    "model/lora=default",
    "model.precision=32-true",
    "experiment=quick",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.max_updates=8",
    "trainer.prompts_per_rollout=1",
    "trainer.checkpoint_every=4",
    "trainer.samples_every=0",
    "group_size=4",
    "mu=4",
    "task.eval_size=4",
    "optimizer.lr=1e-3",
)


def test_an_adapter_on_a_published_folder_trains_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # random weights earn nothing: every text gets a number of its own
    reward = lambda task, example, text: {"luck": float(zlib.crc32(text.encode()) % 7)}  # noqa: E731
    monkeypatch.setattr("spg.tasks.sudoku.Sudoku.reward", reward)
    cfg = config.compose("config", [*SHORT, f"model.path={folder}"])
    start(cfg, tmp_path / "whole", [])
    assert runs.read_config(tmp_path / "whole").model.network.config.d_model == 32
    short = cfg.copy()
    short.trainer.max_updates = 4
    start(short, tmp_path / "again", [])
    resume(str(tmp_path / "again"), ["trainer.max_updates=8"])
    assert same_run(tmp_path / "whole", tmp_path / "again")
    saved = load_file(tmp_path / "again/adapter/adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name), "it has learned"


def test_runs_of_the_version_before_get_what_was_fixed_then(tmp_path: Path) -> None:
    cfg = config.compose("config", [])
    old = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(old, DictConfig)
    old.model = {key: old.model[key] for key in ("network", "tokenizer", "lora", "weights")}
    old.trainer.precision = "32-true"
    runs.write_config(old, tmp_path)
    now = runs.read_updated_config(str(tmp_path))
    new = {key: value for key, value in cfg.model.items() if key not in ("network", "tokenizer")}
    assert {key: now.model[key] for key in new} == new
    assert "defaults" not in now.model
    assert build_policy(old).precision == "32-true", "they go on as they were"
    old.trainer.precision = "bf16-mixed"
    runs.write_config(old, tmp_path)
    assert runs.read_updated_config(str(tmp_path)).model.precision == "bf16-mixed"
    option = config.shipped_option("model", config.compose("config", ["model=llada_toy"]).model)
    assert option is not None
    assert option[0] == "llada_toy"


@pytest.mark.long
def test_a_run_of_the_version_before_goes_on(tmp_path: Path) -> None:
    """Its configuration and its checkpoint lack what is new; nothing is added to either."""
    cfg = config.compose("config", [*QUICK, "task.eval_size=4", "trainer.max_updates=4"])
    start(cfg, tmp_path / "run", [])
    old = runs.read_config(tmp_path / "run")
    old.model = {key: old.model[key] for key in ("network", "tokenizer", "lora", "weights")}
    old.trainer.pop("cut_completions")
    old.trainer.precision = "bf16-mixed"
    for key in ("cache", "refresh_every"):
        old.decoding.pop(key)
    runs.write_config(old, tmp_path / "run")
    last = tmp_path / "run/checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)
    state["spg"]["identity"] = identity(old)
    torch.save(state, last)
    resume(str(tmp_path / "run"), ["trainer.max_updates=8"])
    assert len(comparable(tmp_path / "run")) == 9
    assert "cut_completions" not in runs.read_config(tmp_path / "run").trainer
    assert build_policy(old).precision == "bf16-mixed", "as it was, in its place then"


def test_a_folder_that_would_not_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"model\.weights=published"):
        config.compose("config", ["model=llada_toy", f"model.path={folder}"])
    config.compose("config", ["model=llada_toy", f"model.path={folder}", "model.weights=published"])
    config.compose("config", ["model=llada_8b", "model.weights=random"])


def test_a_run_s_model_may_lie_elsewhere_by_now(folder: Path, tmp_path: Path) -> None:
    cfg = config.compose("config", [*SHORT, f"model.path={folder}", "trainer.max_updates=4"])
    start(cfg, tmp_path / "run", [])
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        lines = [f"run={tmp_path / 'run'}", f"model.path={moved}"]
        settled = merge_settings(config.compose("evaluate", lines), lines)
        assert settled.model.path == settled.model.tokenizer.path == str(moved)
        policy = build_policy(settled)
        assert policy.tokenizer.decode(policy.encode("1+1")) == "1+1"
    finally:
        moved.rename(folder)
