"""Qwen3 with bidirectional attention: Tiny-A2D, and other models of its layout.

The layers are those of transformers, with their parameters and published names. How a layer is computed is
ours: no causal mask, rotary positions in float32, the cache of decoding, and in the last layer only the
positions that are wanted. Logits at a position predict the token of that position: nothing is shifted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from spg.core.rules import Count, Positive, Seed, checked
from spg.models.attention import attend
from spg.models.network import Network, Positions
from spg.models.norm import rms_norm
from spg.models.tokenizer import pretrained

# makes Qwen3's chat template open an answer with an empty thought
NO_THINKING = "{%- set enable_thinking = false %}"


@checked
@dataclass(frozen=True)
class Qwen3DiffusionConfig:
    """Sizes of a bidirectional Qwen3, named as in the published configuration files.

    Raises:
        ValueError: if a size is out of range, or the numbers of heads do not fit each other.
    """

    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    intermediate_size: Count
    vocab_size: Count
    rope_theta: Positive = 1000000.0
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def d_model(self) -> int:
        """Width of the hidden states."""
        return self.hidden_size

    @property
    def embedding_size(self) -> int:
        """Rows of embedding and head."""
        return self.vocab_size

    def for_transformers(self) -> Qwen3Config:
        """Return the same sizes as a configuration of transformers."""
        sizes = {name: value for name, value in vars(self).items() if name != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return Qwen3Config(**sizes, rope_parameters=rope, use_cache=False)


class RMSNorm(Qwen3RMSNorm):
    """The normalisation of transformers' Qwen3, in one kernel on a GPU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise hidden states [... D]."""
        if hidden_states.device.type != "cpu":
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        normal: Tensor = super().forward(hidden_states)
        return normal


class Layer(Qwen3DecoderLayer):
    """A layer of transformers' Qwen3 with bidirectional attention."""

    def __init__(self, config: Qwen3Config, number: int) -> None:
        super().__init__(config, number)
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self.self_attn.q_norm = RMSNorm(config.head_dim, eps)
        self.self_attn.k_norm = RMSNorm(config.head_dim, eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        at: Positions | None = None,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Return the hidden states [N W D] after this layer, or [S D] at the positions `at`.

        `spg.models.attention.attend` describes the arguments.
        """
        own = self.self_attn
        h = self.input_layernorm(x)
        value = self._heads(own.v_proj(h)).transpose(1, 2)
        key = own.k_norm(self._heads(own.k_proj(h))).transpose(1, 2)
        x, attended = attend(x, h, self._query, key, value, rotary, visible, at, store)
        x = x + own.o_proj(attended)
        fed: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + fed

    def _query(self, normal: Tensor) -> Tensor:
        own = self.self_attn
        query: Tensor = own.q_norm(self._heads(own.q_proj(normal)))
        return query.transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.self_attn.head_dim)


class Model(nn.Module):
    """The level `model.` of the published names."""

    def __init__(self, config: Qwen3DiffusionConfig) -> None:
        super().__init__()
        theirs = config.for_transformers()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(theirs, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen3Diffusion(Network):
    """The network: token ids [N L] to hidden states [N L D], and hidden states to logits.

    With `tie_word_embeddings` the weight of the head is the parameter of the embedding. `state_dict` then
    names it once, as `model.embed_tokens.weight`, and loading accepts either name.

    Args:
        config: Its sizes.
        seed: Seed of the initial weights (`Network.initialise`); None leaves them uninitialized.
    """

    # the seven names of the published setting come from Qwen, and name all matrices of a layer
    lora_targets: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("released", "all"),
        r".*\.layers\.\d+\.\w+\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    )

    into_residual: ClassVar[str] = r".*\.(o_proj|down_proj)\.weight"

    # how spg.models.hub reads a published config.json
    published_sizes: ClassVar[Sequence[str]] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    published_implied: ClassVar[Mapping[str, str]] = {
        "rope_theta": "rope_parameters.rope_theta",  # where transformers 5 writes it
        "head_dim": "hidden_size // num_attention_heads",
    }
    published_fixed: ClassVar[Mapping[str, Sequence[Any]]] = {
        "model_type": ("a2d-qwen3",),  # Qwen3's own checkpoints attend to earlier positions only
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "rope_scaling": (None,),
        "rope_parameters.rope_type": ("default",),
        "use_sliding_window": (False,),
    }

    @checked
    def __init__(self, config: Qwen3DiffusionConfig, seed: Seed | None = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        self.register_state_dict_post_hook(_keep_one_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_accept_either_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]
        if seed is not None:
            self.initialise(seed)

    def tie(self) -> None:
        """Use the parameter of the embedding in the head too, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # a move off the meta device makes new parameters of both
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    @property
    def head(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        return self.model.layers

    @property
    def embedding(self) -> nn.Module:
        """The embedding."""
        return self.model.embed_tokens

    @property
    def norm(self) -> nn.Module:
        """The normalisation after the last layer."""
        return self.model.norm

    def frequencies(self, device: torch.device) -> Tensor:
        """Return the rotary frequencies [d / 2], in radians a position."""
        theirs = self.config.for_transformers()
        frequencies: Tensor = Qwen3RotaryEmbedding.compute_default_rope_parameters(theirs)[0]
        return frequencies.to(device)

    def published_config(self) -> dict[str, Any]:
        """Return the fields of a published config.json: the sizes, and what identifies this class."""
        sizes = vars(self.config)
        return {
            "architectures": ["A2DQwen3LMHeadModel"],
            "model_type": "a2d-qwen3",
            **sizes,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "layer_types": ["full_attention"] * self.config.num_hidden_layers,
            "max_position_embeddings": 40960,
            "max_window_layers": self.config.num_hidden_layers,
            "sliding_window": None,
            "use_cache": False,
            "use_sliding_window": False,
        }


def a2d_tokenizer(
    path: str, revision: str | None = None, mask_token: str | None = "<|mask|>"
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Tiny-A2D model from a folder or a hub id, as its network expects it.

    A completion ends at `<|im_end|>`, which is also the padding: the network was trained to fill what follows
    with `<|endoftext|>`, the padding of Qwen3, and padding can never be chosen. Answers are opened without
    thinking, as the card of the model recommends.

    Args:
        path: Folder or hub id of the model.
        revision: Branch, tag or commit of the hub id; None for its main branch.
        mask_token: The mask, if the tokenizer declares none.

    Raises:
        InputError: if nothing can be loaded, or a token is not in the vocabulary.
    """
    with warnings.catch_warnings():
        # transformers reads config.json too, and warns that some of its fields are out of date
        warnings.simplefilter("ignore", FutureWarning)
        tokenizer = pretrained(path, revision, mask_token=mask_token)
    tokenizer.pad_token = tokenizer.eos_token
    template = tokenizer.chat_template
    # a folder that was exported with this tokenizer has it already
    if isinstance(template, str) and not template.startswith(NO_THINKING):
        tokenizer.chat_template = NO_THINKING + template
    return tokenizer


_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _keep_one_name(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove the tied head from a state dict, as transformers does: files can't hold a tensor twice."""
    assert isinstance(network, Qwen3Diffusion)
    if network.config.tie_word_embeddings:
        state.pop(prefix + _HEAD, None)


def _accept_either_name(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the other name of the tied parameter to a state dict that has one."""
    assert isinstance(network, Qwen3Diffusion)
    if network.config.tie_word_embeddings:
        for given, other in ((_EMBEDDING, _HEAD), (_HEAD, _EMBEDDING)):
            if prefix + given in state:
                state.setdefault(prefix + other, state[prefix + given])


def _tie_again(network: nn.Module, _: Any) -> None:
    """Tie head and embedding again after loading by assignment has made them two parameters."""
    assert isinstance(network, Qwen3Diffusion)
    network.tie()
