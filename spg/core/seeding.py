"""Random streams that depend on names and numbers only, never on how much another stream has drawn."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor


def derive_seed(seed: int, *path: str | int) -> int:
    """Return the 63-bit seed of the stream that `path` names.

    Args:
        seed: The seed that all streams of a run share.
        *path: Names and numbers that tell the stream from others.
    """
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: str | int) -> Generator:
    """Return a CPU generator at the start of the stream that `path` names; see `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


class Streams:
    """B streams of uniform numbers, in which number i of a row depends on (seed, index of the row, i) only.

    Neither other rows, nor the size of a draw along any axis, nor the device changes a number. The numbers
    are those of splitmix64 (Steele, Lea and Flood 2014), keyed axis by axis. Each call to `uniform` draws new
    numbers.

    Args:
        seed: The seed of all rows.
        index: Whole numbers [B] that tell rows apart.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        self._rows = _key(torch.full_like(index, seed & _LOW_63), index)
        self._calls = 0

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw numbers [B *shape] that are uniform from 0 to below 1.

        Args:
            *shape: The axes after the first.
            dtype: float32 or float64.
        """
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
    """Shift int64 numbers to the right and fill with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _key(key: Tensor, number: Tensor) -> Tensor:
    """Return output `number` of splitmix64 after the state `key`, in int64 with wrap-around."""
    x = key + (number + 1) * _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)
