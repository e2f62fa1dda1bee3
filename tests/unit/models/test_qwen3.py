"""The bidirectional Qwen3 against transformers' own, and what decoding and updates ask of it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from spg import config
from spg.cli.train import start
from spg.core.errors import InputError
from spg.models import hub
from spg.models.factory import build_policy
from spg.models.lora import LoRA, add_adapter, save_adapter
from spg.models.network import Cache, Positions
from spg.models.policy import Policy
from spg.models.qwen3 import Qwen3Diffusion, Qwen3DiffusionConfig, a2d_tokenizer
from spg.models.tokenizer import tiny_tokenizer
from spg.models.weights import load_weights, save_weights
from spg.rollout.decoder import Decoder
from tests.helpers import comparable, open_prompts

# heads are wider than hidden_size / num_attention_heads, as Qwen3-0.6B's are
SIZES = Qwen3DiffusionConfig(32, 3, 4, 2, 12, 48, vocab_size=40, rope_theta=100.0)
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def small(seed: int | None = 0, **sizes: int | bool) -> Qwen3Diffusion:
    """Return a small network whose norms are not 1, so that each one counts."""
    network = Qwen3Diffusion(dataclasses.replace(SIZES, **sizes), seed=seed)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=g)
    return network


def tokens(rows: int = 4, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(5, 28, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(length: int = 9) -> Tensor:
    """Return the real positions of four left-padded rows."""
    return torch.arange(length) >= torch.tensor([[0], [2], [5], [1]])


def theirs(network: Qwen3Diffusion) -> Qwen3ForCausalLM:
    """Return transformers' own Qwen3 with the same weights."""
    config = network.config.for_transformers()
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict(network.state_dict(), strict=not network.config.tie_word_embeddings)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [9, 80])
@torch.no_grad()
def test_logits_are_those_of_transformers_without_its_causal_mask(tied: bool, length: int) -> None:
    network = small(tie_word_embeddings=tied)
    ids, reference = tokens(length=length), theirs(network)
    every = torch.zeros(4, 1, length, length)
    expected = reference(input_ids=ids, attention_mask=every).logits
    assert torch.allclose(network.logits(network.hidden(ids)), expected, atol=1e-5)
    causal = reference(input_ids=ids).logits
    assert not torch.allclose(network.logits(network.hidden(ids)), causal, atol=0.1)
    real = padding(length)
    seen = every.masked_fill(~real[:, None, None, :], torch.finfo(torch.float).min)
    expected = reference(input_ids=ids, attention_mask=seen).logits
    assert torch.allclose(network.logits(network.hidden(ids, real))[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_every_position_sees_later_ones(masked: bool) -> None:
    network, ids = small(), tokens()
    mask = torch.ones_like(ids, dtype=torch.bool) if masked else None
    other = ids.clone()
    other[:, -1] += 1
    changed = (network.hidden(ids, mask) - network.hidden(other, mask)).abs().amax(-1)
    assert float(changed.min()) > 1e-3


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone() -> None:
    network, ids, real = small(), tokens(), padding()
    together = network.hidden(ids, real)
    for row in range(4):
        alone = network.hidden(ids[row, real[row]].unsqueeze(0))
        assert torch.allclose(together[row, real[row]], alone[0], atol=1e-5)


@torch.no_grad()
def test_wanted_positions_alone() -> None:
    network, ids, real = small(), tokens(), padding()
    every = network.hidden(ids, real)
    at = real & (ids % 3 == 0)
    assert torch.allclose(network.hidden(ids, real, Positions.of_mask(at)), every[at], atol=1e-6)
    columns = torch.tensor([[5, 8], [6, 7], [5, 6], [7, 8]])
    expected = every.gather(1, columns.unsqueeze(-1).expand(-1, -1, 32)).flatten(0, 1)
    assert torch.allclose(network.hidden(ids, real, Positions(columns)), expected, atol=1e-6)


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_cache_stands_for_the_positions_outside_of_the_window(padded: bool) -> None:
    network, ids, real, cache = small(), tokens(), padding() if padded else None, Cache()
    whole = network.hidden(ids, real, cache=cache)
    assert torch.equal(whole, network.hidden(ids, real))
    assert cache.slot(0, 0).keys.shape == (4, 2, 9, 12)
    assert torch.allclose(network.hidden(ids[:, 6:8], real, None, cache, 6), whole[:, 6:8], atol=1e-5)
    at = Positions(torch.tensor([[0], [1], [0], [1]]))
    few = network.hidden(ids[:, 6:8], real, at, cache, 6)
    assert torch.allclose(few, whole[torch.arange(4), 6 + at.columns[:, 0]], atol=1e-5)
    # in a first layer, keys and values depend on their own position's token alone
    network, cache = small(num_hidden_layers=1), Cache()
    network.hidden(ids, real, cache=cache)
    ids = ids.clone()
    ids[:, 6:8] += 3
    seen = network.hidden(ids[:, 6:8], real, None, cache, 6)
    assert torch.allclose(seen, network.hidden(ids, real)[:, 6:8], atol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        network = small()
        network.checkpointing = checkpointing
        states = network.hidden(tokens(), padding(), Positions.of_mask(padding()))
        network.logits(states).log_softmax(-1)[:, 7].sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def is_tied(network: Qwen3Diffusion) -> bool:
    return network.lm_head.weight is network.model.embed_tokens.weight


def test_the_head_stays_the_embedding() -> None:
    network, ids = small(), tokens()
    with torch.device("meta"):
        hollow = Qwen3Diffusion(SIZES, seed=None)
    assert not [name for name, _ in hollow.named_buffers()]
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assigned = copy.deepcopy(hollow)
    assigned.load_state_dict(network.state_dict(), assign=True)
    emptied = copy.deepcopy(hollow).to_empty(device="cpu")
    emptied.load_state_dict(network.state_dict())
    with torch.no_grad():
        expected = network.logits(network.hidden(ids))
        for other in (assigned, emptied, copy.deepcopy(network)):
            assert is_tied(other)
            assert len(list(other.parameters())) == len(list(network.parameters()))
            assert torch.equal(other.logits(other.hidden(ids)), expected)
    untied = small(tie_word_embeddings=False)
    assert not is_tied(untied)
    assert set(untied.state_dict()) - set(network.state_dict()) == {"lm_head.weight"}


def test_tensor_names_are_the_published_ones(tmp_path: Path) -> None:
    network = small()
    theirs(network).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in network.state_dict().items()}
    save_file(
        {name: t.contiguous() for name, t in network.state_dict().items()}, tmp_path / "ours.safetensors"
    )
    # files that name the tied tensor twice, or as the head alone, load as well
    state = network.state_dict()
    shared = state.pop("model.embed_tokens.weight")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        other = small(seed=3)
        other.load_state_dict({**state, **dict.fromkeys(names, shared)})
        assert torch.equal(other.model.embed_tokens.weight, shared)
        assert is_tied(other)
    with pytest.raises(RuntimeError, match="Missing key"):
        small().load_state_dict(state)


def test_weights_derive_from_their_seed() -> None:
    first, second, other = (Qwen3Diffusion(SIZES, seed=seed) for seed in (5, 5, 6))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert parameter.ndim == 1 or not torch.equal(parameter, other.get_parameter(name))
    deep = first.model.layers[0].self_attn.o_proj.weight
    assert float(deep.detach().std()) == pytest.approx((48 * 6) ** -0.5, rel=0.1)


@torch.no_grad()
def test_rotary_tables_are_not_rounded_with_the_weights() -> None:
    network = small().to(torch.bfloat16)
    exact = [table.clone() for table in small()._rotary_tables(300, torch.device("cpu"))]
    assert network.hidden(tokens()).dtype == torch.bfloat16
    assert all(map(torch.equal, network._rotary_tables(300, torch.device("cpu")), exact))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = small().hidden(tokens())
    assert torch.allclose(mixed.float(), small().hidden(tokens()), atol=0.1)


@pytest.mark.parametrize("targets", ["released", "all"])
def test_an_adapter_trains_all_seven_matrices_and_merges(targets: str, tmp_path: Path) -> None:
    network, ids = small(), tokens()
    adapter = add_adapter(network, LoRA(4, 8, 0.0, targets))
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    found = {(name.split(".layers.")[1].split(".")[0], name.split(".")[-4]) for name in trained}
    assert found == {(layer, matrix) for layer in "012" for matrix in MATRICES}
    with torch.no_grad():
        expected = network.logits(network.hidden(ids))
        assert torch.equal(expected, small().logits(small().hidden(ids))), "a new adapter changes nothing"
        for name in trained:
            network.get_parameter(name).normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        expected = network.logits(network.hidden(ids))
        save_adapter(adapter, tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(small(), str(tmp_path / "adapter")).eval().base_model.model
        assert torch.allclose(loaded.logits(loaded.hidden(ids)), expected, atol=1e-5)
        merged = adapter.merge_and_unload()
        assert is_tied(merged)
        assert merged.state_dict().keys() == small().state_dict().keys()
        assert torch.allclose(merged.logits(merged.hidden(ids)), expected, atol=1e-5)
        assert not torch.allclose(expected, small().logits(small().hidden(ids)), atol=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_policy_decodes_and_learns(precision: str) -> None:
    policy = Policy(small(), tiny_tokenizer(), precision=precision)
    prompts = open_prompts(tokens(), 8, padding())
    rollout = Decoder(8, 4, 4, 1.0, "low_confidence", stop_at_eos=False)(policy, prompts, 3)
    assert not bool((rollout.completion_ids == policy.mask_id).any())
    assert int(rollout.completion_ids.max()) < len(policy.tokenizer), "rows of the head without a token"
    masked = torch.cat([prompts.ids, torch.full_like(rollout.completion_ids, policy.mask_id)], dim=1)
    mask = torch.cat([prompts.mask, torch.ones_like(rollout.completion_ids, dtype=torch.bool)], dim=1)
    scored = torch.ones_like(rollout.completion_ids, dtype=torch.bool)
    logps = policy.token_logps(masked, mask, rollout.completion_ids, scored)
    states = policy.network.hidden(masked, mask)[:, 9:]
    expected = policy.network.logits(states).log_softmax(-1)
    expected = expected.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(logps, expected, atol=1e-4 if precision == "32-true" else 0.2)
    logps.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())


def test_the_published_fields_are_read_by_transformers(tmp_path: Path) -> None:
    network, ids = small(), tokens()
    fields = network.published_config()
    assert fields["model_type"] == "a2d-qwen3"
    # transformers knows the type by its causal name only
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "qwen3"}))
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference = Qwen3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=torch.zeros(4, 1, 9, 9)).logits
        assert torch.allclose(network.logits(network.hidden(ids)), expected, atol=1e-5)


def test_a_published_configuration_gives_the_sizes() -> None:
    target, ours = "spg.models.qwen3.Qwen3Diffusion", small().published_config()
    # transformers 5 writes the base of the rotary positions elsewhere
    later = {**SIZES.for_transformers().to_dict(), "model_type": "a2d-qwen3"}
    assert "rope_theta" not in later
    for fields in (ours, later):
        assert Qwen3DiffusionConfig(**hub.sizes(target, fields, "here")) == SIZES
    for other in ({"model_type": "qwen3"}, {"attention_bias": True}, {"rope_scaling": {"factor": 4.0}}):
        with pytest.raises(InputError, match=f"another model than Qwen3Diffusion: {next(iter(other))}="):
            hub.sizes(target, {**ours, **other}, "here")
    stretched = {**later, "rope_parameters": {"rope_theta": 100.0, "rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(
        InputError, match=r"another model .*: rope_parameters\.rope_type=yarn \(not default\)"
    ):
        hub.sizes(target, stretched, "here")
    with pytest.raises(InputError, match="it has no head_dim, rope_theta"):
        hub.sizes(
            target, {**later, "head_dim": None, "num_attention_heads": "4", "rope_parameters": None}, "here"
        )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"intermediate_size": 0}, "intermediate_size=0 is out of range"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is out of range"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **sizes)


def test_the_shipped_sizes_are_qwen3_s() -> None:
    cfg = config.compose("config", ["model=tiny_a2d"])
    with torch.device("meta"):
        network: nn.Module = config.build(cfg.model.network, seed=None)
    assert sum(parameter.numel() for parameter in network.parameters()) == 596_049_920
    assert (cfg.model.lora.r, cfg.model.lora.alpha) == (128, 64)


# as Qwen3's does: chats in ChatML, and an empty thought where thinking is switched off
CHAT = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def tokenizer_files(folder: Path, **special: str) -> Path:
    """Write the files of a byte-level tokenizer with Qwen3's special tokens."""
    words = {word: i for i, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|mask|>"]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
        **special,
    ).save_pretrained(folder)
    # the class that the published files name
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "Qwen2Tokenizer"}))
    return folder


def test_the_tokenizer_pads_with_the_end_of_a_completion_and_opens_no_thought(tmp_path: Path) -> None:
    declared = a2d_tokenizer(str(tokenizer_files(tmp_path / "declared", mask_token="<|mask|>")))
    tokenizer = a2d_tokenizer(str(tokenizer_files(tmp_path / "silent")))
    tokenizer.save_pretrained(tmp_path / "exported")
    for each in (declared, tokenizer, a2d_tokenizer(str(tmp_path / "exported"))):
        assert (each.mask_token, each.eos_token, each.pad_token) == ("<|mask|>", "<|im_end|>", "<|im_end|>")
        policy = Policy(small(vocab_size=270), each)
        ids = policy.encode([{"role": "user", "content": "1 + 1"}])
        assert each.decode(ids) == (
            "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        never = policy._excluded_ids(270, torch.device("cpu"))
        assert not never[each.convert_tokens_to_ids("<|endoftext|>")]
        assert never[policy.mask_id]
    with pytest.raises(InputError, match="nothing"):
        a2d_tokenizer(str(tmp_path / "silent"), mask_token="<|nothing|>")


def publish(folder: Path) -> Path:
    """Write a small model in the published layout, with the tied tensor under both its names."""
    path = tokenizer_files(folder, mask_token="<|mask|>")
    network = small(vocab_size=270)
    fields = {**network.published_config(), "rope_scaling": None, "mask_token_id": 261}
    (path / "config.json").write_text(json.dumps(fields))
    state = network.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder that no test changes."""
    return publish(tmp_path_factory.mktemp("a2d"))


# a run of two updates
FEW = (
    "task=countdown",
    "task.eval_size=2",
    "task.train_size=8",
    "gen_length=8",
    "block_size=4",
    "group_size=2",
    "num_mc=1",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.max_updates=2",
    "trainer.prompts_per_rollout=1",
)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_published_folder_loads(folder: Path) -> None:
    network, ids = small(vocab_size=270), tokens()
    lines = ["model=tiny_a2d", f"model.path={folder}", "trainer.accelerator=cpu"]
    cfg = hub.settle(config.compose("config", lines))
    policy = build_policy(cfg)
    kinds = {p.dtype for p in policy.parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert is_tied(policy.network)
    plain = hub.settle(config.compose("config", [*lines, "model.lora=null"]))
    loaded = build_policy(plain).network
    assert is_tied(loaded)
    with torch.no_grad():
        expected = network.logits(network.hidden(ids))
        assert torch.equal(loaded.logits(loaded.hidden(ids)), expected)


@pytest.mark.long
def test_a_published_folder_is_trained(folder: Path, tmp_path: Path) -> None:
    lines = ["model=tiny_a2d", f"model.path={folder}", *FEW]
    start(hub.settle(config.compose("config", lines)), tmp_path / "run", [])
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert len(comparable(tmp_path / "run")) == 3


def test_weights_of_full_fine_tuning_are_written_and_read(tmp_path: Path) -> None:
    save_weights(small(), tmp_path / "weights.safetensors", {})
    other = small(seed=4)
    load_weights(other, tmp_path / "weights.safetensors")
    assert is_tied(other)
    assert torch.equal(other.model.embed_tokens.weight, small().model.embed_tokens.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_on_a_gpu_a_padded_row_equals_the_row_alone() -> None:
    network, ids, real = small().to("cuda"), tokens(length=80).cuda(), padding(80).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        together = network.hidden(ids, real)
        for row in range(4):
            alone = network.hidden(ids[row, real[row]].unsqueeze(0))
            assert torch.allclose(together[row, real[row]], alone[0], atol=0.1)
    expected = small().hidden(ids.cpu(), real.cpu())
    assert torch.allclose(network.hidden(ids, real).cpu()[real.cpu()], expected[real.cpu()], atol=1e-3)
