"""LLaDA (Nie et al. 2025): a bidirectional transformer whose tensors have the published names.

Pre-norm RMSNorm, rotary positions, SwiGLU, scaled-dot-product attention, no biases, an untied head.
Dropout is left out. The same class serves the tiny model and the published checkpoints
(`model.transformer.blocks.N.q_proj.weight` and so on).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spg.core.rules import Count, Positive, Seed, checked
from spg.models.attention import attend
from spg.models.network import Network, Positions
from spg.models.norm import rms_norm

# fields of the published configuration files that are the same for all sizes
SHARED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "max_sequence_length": 4096,
    "mlp_ratio": 4,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
    "use_cache": False,
    "weight_tying": False,
}


@checked
@dataclass(frozen=True)
class LLaDAConfig:
    """Sizes of a LLaDA network, named as in the published configuration files.

    Raises:
        ValueError: if a size is out of range, or the heads do not divide the width.
    """

    d_model: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count
    mlp_hidden_size: Count
    vocab_size: Count
    embedding_size: Count
    rope_theta: Positive = 500000.0
    rms_norm_eps: Positive = 1e-5

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"n_heads={self.n_heads} must divide d_model={self.d_model} into heads of even width"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"embedding_size={self.embedding_size} must be vocab_size={self.vocab_size} or more"
            )


class _Normalize(torch.autograd.Function):
    """x / rms(x) over the last axis; its backward pass reads memory half as often as separate operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, scale)
        return normal

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        normal, scale = ctx.saved_tensors
        (gradient,) = gradients
        shared = (gradient * normal).mean(-1, keepdim=True)
        return torch.addcmul(gradient, normal, shared, value=-1).mul_(scale), None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [... D]."""
        if x.device.type != "cpu":
            return rms_norm(x, self.weight, self.eps)
        normal: Tensor = _Normalize.apply(x.float(), self.eps)  # type: ignore[no-untyped-call]
        return normal.to(x.dtype) * self.weight


class Block(nn.Module):
    """One transformer layer: attention, then SwiGLU, each normalised before and added after."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, head = config.d_model, config.d_model // config.n_heads
        self.head_width = head
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, config.n_kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.n_kv_heads * head, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

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
        h = self.attn_norm(x)
        key, value = self._heads(self.k_proj(h)), self._heads(self.v_proj(h))
        x, attended = attend(x, h, self._query, key, value, rotary, visible, at, store)
        x = x + self.attn_out(attended)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def _query(self, normal: Tensor) -> Tensor:
        return self._heads(self.q_proj(normal))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_width).transpose(1, 2)


class Transformer(nn.Module):
    """The parts of the network under their published names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = nn.Linear(config.d_model, config.embedding_size, bias=False)


class Model(nn.Module):
    """The level `model.` of the published names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.transformer = Transformer(config)


class LLaDA(Network):
    """The network: token ids [N L] to hidden states [N L D], and hidden states to logits.

    Args:
        config: Its sizes.
        seed: Seed of the initial weights (`Network.initialise`); None leaves them uninitialized.
    """

    # The layers have these four of the seven names in the published setting. The patterns are whole paths
    # because a layer's ff_out has the same name as the head.
    lora_targets: ClassVar[Mapping[str, str]] = {
        "released": r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|up_proj)",
        "all": r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
    }

    into_residual: ClassVar[str] = r".*\.blocks\.\d+\.(attn_out|ff_out)\.weight"

    # how spg.models.hub reads a published config.json
    published_sizes: ClassVar[Sequence[str]] = (
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "mlp_hidden_size",
        "vocab_size",
        "embedding_size",
        "rope_theta",
        "rms_norm_eps",
    )
    published_implied: ClassVar[Mapping[str, str]] = {
        "n_kv_heads": "n_heads",
        "embedding_size": "vocab_size",
        "mlp_hidden_size": "mlp_ratio * d_model",
    }
    published_fixed: ClassVar[Mapping[str, Sequence[Any]]] = {
        "model_type": ("llada",),
        "block_type": ("llama",),
        "block_group_size": (1,),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False,),
        "input_emb_norm": (False,),
        "rope": (True,),
        "rope_full_precision": (True,),
        "alibi": (False,),
        "clip_qkv": (None,),
        "multi_query_attention": (False, None),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "weight_tying": (False,),
        "scale_logits": (False,),
    }

    @checked
    def __init__(self, config: LLaDAConfig, seed: Seed | None = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        if seed is not None:
            self.initialise(seed)

    @property
    def head(self) -> nn.Module:
        """The output head, whose weights are not those of the embedding."""
        return self.model.transformer.ff_out

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.model.transformer.blocks

    def published_config(self) -> dict[str, Any]:
        """Return the fields of a published config.json: the sizes, and what identifies this class."""
        return {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            **asdict(self.config),
            **SHARED,
        }

    @property
    def embedding(self) -> nn.Module:
        """The embedding."""
        return self.model.transformer.wte

    @property
    def norm(self) -> nn.Module:
        """The normalisation after the last block."""
        return self.model.transformer.ln_f

    def frequencies(self, device: torch.device) -> Tensor:
        """Return the rotary frequencies [d / 2], in radians a position."""
        half = self.config.d_model // self.config.n_heads // 2
        exponent = torch.arange(half, device=device, dtype=torch.float) / half
        frequencies: Tensor = self.config.rope_theta**-exponent
        return frequencies
