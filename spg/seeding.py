"""Random streams that derive from names and numbers, never from how far another stream has run."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for the stream that `path` names under `seed`."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: str | int) -> Generator:
    """Return a CPU generator at the start of the stream that `path` names under `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))
