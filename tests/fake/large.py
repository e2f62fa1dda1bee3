"""LLaDA-8B without its weights: real sizes on the pretended device, with tensors that have no values."""

from __future__ import annotations

import torch

from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.lora import LoRA
from spg.models.policy import Policy
from tests.fake.tensors import Counts, counting
from tests.helpers import Ids

SIZES = LLaDAConfig(
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    mlp_hidden_size=12288,
    vocab_size=126464,
    embedding_size=126464,
)
# sequences of 256 prompt tokens and 256 completion tokens, decoded in blocks of 32
PROMPT, COMPLETION, BLOCK = 256, 256, 32


def policy() -> Policy:
    """Return the policy of the paper's runs: bfloat16 with an adapter."""
    with torch.device("meta"):
        network = LLaDA(SIZES, seed=None)
    network.to(torch.bfloat16).to_empty(device="cuda")
    made = Policy(network, Ids(mask=126336, eos=126081, pad=126081), "bf16-mixed")
    made.adapt(LoRA(128, 64, 0.05, "released"))
    return made


def tokens(rows: int) -> torch.Tensor:
    """Return token ids of sequences [N L]."""
    return torch.zeros(rows, PROMPT + COMPLETION, dtype=torch.long, device="cuda")


def padding(rows: int) -> torch.Tensor:
    """Return which tokens are real [N L]."""
    return torch.ones(rows, PROMPT + COMPLETION, dtype=torch.bool, device="cuda")


def step(made: Policy, rows: int, *, padded: bool) -> Counts:
    """Count one decoding step."""
    ids, mask = tokens(rows), padding(rows) if padded else None
    columns = torch.zeros(rows, BLOCK, dtype=torch.long, device="cuda")
    noise = torch.zeros(rows, BLOCK, dtype=torch.double, device="cuda")
    with made.decoding(), counting() as counts:
        chosen, sure = made.propose(ids, mask, columns, 0.9, noise, shared=False)
    assert chosen.shape == sure.shape == (rows, BLOCK)
    return counts


def piece(made: Policy, rows: int, *, padded: bool) -> Counts:
    """Count a piece of an update: log-probabilities of masked copies, and their gradient."""
    ids, mask = tokens(rows), padding(rows) if padded else None
    scored = torch.ones(rows, COMPLETION, dtype=torch.bool, device="cuda")
    made.train()
    made.zero_grad()
    with counting() as counts:
        logps = made.token_logps(
            ids, mask, ids[:, PROMPT:], scored, [COMPLETION - 5 * n for n in range(rows)]
        )
        logps.sum().backward()
    assert logps.shape == (rows, COMPLETION)
    return counts
