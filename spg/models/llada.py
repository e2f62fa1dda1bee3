"""LLaDA, natively: a bidirectional transformer whose tensors carry the published names.

Pre-norm RMSNorm, rotary positions, SwiGLU, scaled-dot-product attention, no biases, an untied head.
Dropout and key-value caches are left out. The same class serves the embedded tiny model and the
published checkpoints (`model.transformer.blocks.N.q_proj.weight` and so on).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spg.limits import check_limits
from spg.models.network import Network


@dataclass(frozen=True)
class LLaDAConfig:
    """Sizes of a LLaDA network, named as in the published configuration files.

    Raises ValueError where a size is out of range or the heads do not divide the width.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_limits(**vars(self))
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


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [... D]."""
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [N H L d] with tables [L d], in float32, halves paired."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Block(nn.Module):
    """One transformer layer: attention, then SwiGLU, each normalised before and added after."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, head = config.d_model, config.d_model // config.n_heads
        self.head_width = head
        self.grouped = config.n_kv_heads != config.n_heads
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, config.n_kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.n_kv_heads * head, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        """Map hidden states [N L D]; `bias` [N 1 1 L] is True at the positions that may be seen."""
        h = self.attn_norm(x)
        q, k, v = (self._heads(p(h)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=self.grouped)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

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

    seed: of the initial weights, normal with deviation 1 / sqrt(inputs), those that write into the
    residual stream divided by sqrt(2 * layers).
    """

    def __init__(self, config: LLaDAConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        self._rotary: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = "blocks" in name and ("attn_out" in name or "ff_out" in name)
                std = parameter.shape[1] ** -0.5 / (depth if into_residual else 1)
                nn.init.normal_(parameter, std=std, generator=generator)

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the final hidden states [N L D] of `ids` [N L].

        attention_mask [N L]: True at real tokens; padding is seen by no position, and rotary
        positions are relative, so that a padded row equals the row alone. None: nothing is padded.
        """
        parts = self.model.transformer
        x = parts.wte(ids)
        rotary = self._rotary_tables(ids.shape[1], ids.device)
        bias = None if attention_mask is None else attention_mask[:, None, None, :]
        for block in parts.blocks:
            x = block(x, rotary, bias)
        return parts.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [... V] of hidden states [... D]."""
        return self.model.transformer.ff_out(hidden)

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (length, device)
        if key not in self._rotary:
            half = self.config.d_model // self.config.n_heads // 2
            exponent = torch.arange(half, device=device, dtype=torch.float) / half
            angles = torch.outer(
                torch.arange(length, device=device, dtype=torch.float),
                self.config.rope_theta**-exponent,
            )
            angles = torch.cat([angles, angles], dim=-1)
            self._rotary[key] = (angles.cos(), angles.sin())
        return self._rotary[key]
