"""Choosing tokens from logits: the most likely one or a draw, and how clear a choice is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# how clear a choice is: what `choose` returns beside the token
Measure = Literal["probability", "unguided_probability", "margin", "negative_entropy", "lead"]


def choose(
    logits: Tensor,
    unguided: Tensor,
    excluded: Tensor,
    temperature: float,
    noise: Tensor | None,
    measures: Sequence[Measure],
) -> tuple[Tensor, ...]:
    """Choose a token by each row of logits, and measure the choices; see `Policy.propose`.

    Args:
        logits: What is chosen by, in float32 [S V].
        unguided: The logits without guidance [S V].
        excluded: True at tokens that are never chosen [V].
        temperature: Of the draws.
        noise: Uniform on [0, 1) [S]; None for the most likely tokens.
        measures: What to return beside the tokens.

    Returns:
        Token ids [S], then each of `measures` [S].
    """
    allowed = logits.masked_fill(excluded, -torch.inf)
    ids = allowed.argmax(-1) if noise is None else _sample(allowed.double() / temperature, noise)

    def measure(name: Measure) -> Tensor:
        if name == "lead":
            return _gap(allowed)
        # over the whole head, as in the released code: excluded tokens take their share of probability
        probabilities = (unguided if name == "unguided_probability" else logits).softmax(-1)
        if name in ("probability", "unguided_probability"):
            return probabilities.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        if name == "margin":
            return _gap(probabilities.masked_fill(excluded, 0.0))
        # `entr` is 0 at 0, where p log p has no value
        return -torch.special.entr(probabilities).sum(-1)

    return ids, *map(measure, measures)


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of the distinct rows [U] of rows [N L], and which of these each row equals [N]."""
    distinct, which = torch.unique(rows, dim=0, return_inverse=True)
    numbers = torch.arange(len(rows), device=rows.device)
    return torch.zeros_like(distinct[:, 0]).scatter(0, which, numbers), which


def _sample(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw from softmax(logits) [S V] by inverse CDF, from noise [S] uniform on [0, 1), all in float64."""
    cumulative = logits.softmax(-1).cumsum(-1)
    threshold = noise.unsqueeze(-1) * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return ids.clamp_max(logits.shape[-1] - 1)


def _gap(values: Tensor) -> Tensor:
    """Return by how much the largest of `values` [... V] exceeds the second largest [...]."""
    largest = values.topk(2, dim=-1).values
    return largest[..., 0] - largest[..., 1]
