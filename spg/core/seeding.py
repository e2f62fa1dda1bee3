"""Random streams that derive from names and numbers, never from how far another stream has run."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for the stream that `path` names under `seed`."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: str | int) -> Generator:
    """Return a CPU generator at the start of the stream that `path` names under `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


class Streams:
    """B streams of uniform numbers: number i of the stream of row `index` derives from (seed, index, i).

    index [B]: whole numbers that tell rows apart. Which rows stand beside a row, and how far a draw
    reaches along any axis, changes none of its numbers, on any device. They are splitmix64's
    (Steele, Lea and Flood 2014), keyed axis by axis. Each call to `uniform` goes on to fresh numbers.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        self._rows = _key(torch.full_like(index, seed & _LOW_63), index)
        self._calls = 0

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw numbers [B *shape], uniform from 0 to below 1, in float32 or float64."""
        self._calls += 1
        keys = _key(self._rows, torch.full_like(self._rows, self._calls))
        for size in shape:
            keys = _key(keys.unsqueeze(-1), torch.arange(size, device=keys.device))
        bits = 53 if dtype == torch.double else 24
        return _shifted(keys, 64 - bits).to(dtype) * 2.0**-bits


_LOW_63 = 2**63 - 1
# splitmix64's increment and multipliers, as signed 64-bit numbers
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift int64 numbers right, zeros following."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _key(key: Tensor, number: Tensor) -> Tensor:
    """Return splitmix64's output number `number` after the state `key`, int64 with wrap-around."""
    x = key + (number + 1) * _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)
