"""The native LLaDA against a public implementation, and its published tensor names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import GOLDEN, golden_network

NETWORK = golden_network()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [("ids", "logits"), ("ids_masked", "logits_masked"), ("ids_left_padded", "logits_left_padded_mask")],
)
@torch.no_grad()
def test_logits(ids: str, expected: str) -> None:
    with np.load(GOLDEN / "llada" / "logits.npz") as z:
        inputs, real = torch.from_numpy(z[ids]), torch.from_numpy(z["attention_mask"]).bool()
        reference = torch.from_numpy(z[f"zhzisz_dllm.{expected}"])
    padded = ids == "ids_left_padded"
    ours = NETWORK.logits(NETWORK.hidden(inputs, real if padded else None))
    difference = (ours - reference).abs()
    assert float((difference[real] if padded else difference).max()) < 1e-4


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone() -> None:
    with np.load(GOLDEN / "llada" / "logits.npz") as z:
        inputs, real = torch.from_numpy(z["ids_left_padded"]), torch.from_numpy(z["attention_mask"]).bool()
    together = NETWORK.logits(NETWORK.hidden(inputs, real))
    for row, mask, logits in zip(inputs, real, together, strict=True):
        alone = NETWORK.logits(NETWORK.hidden(row[mask].unsqueeze(0)))
        assert torch.allclose(alone[0], logits[mask], atol=1e-4)


def test_tensor_names_are_the_published_ones() -> None:
    published = load_file(GOLDEN / "llada" / "tiny_llada.safetensors")
    assert {n: t.shape for n, t in NETWORK.state_dict().items()} == {n: t.shape for n, t in published.items()}
    assert "model.transformer.blocks.0.attn_out.weight" in published
