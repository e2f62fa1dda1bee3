"""Classifier-free guidance of a masked diffusion language model, which needs no training of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Strengthens what the known tokens say, as LLaDA's released decoder does (Nie et al. 2025).

    Each row has an unconditional copy, in which the known tokens are masked. The guided logits are
    u + (scale + 1) (c - u), for the logits c of the row and u of its copy.

    Attributes:
        scale: 0 or more; 0 changes nothing.
        known: Tokens that were there before decoding: the prompt and the given ones of a template [N L].
    """

    scale: float
    known: Tensor

    def with_copies(self, tokens: Tensor, mask_id: int) -> Tensor:
        """Return the rows of `tokens` [N L], then their unconditional copies [2N L]."""
        return torch.cat([tokens, tokens.masked_fill(self.known, mask_id)])

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Return the guided logits [... V]."""
        return unconditional + (self.scale + 1) * (conditional - unconditional)
