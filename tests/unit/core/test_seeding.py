"""Random streams: the reference's numbers, independence of neighbours and padding, uniformity."""

from __future__ import annotations

import torch

from spg.core.seeding import Streams, _key


def test_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of the published generator from the state 1234567."""
    ours = _key(torch.tensor(1234567), torch.arange(3)).tolist()
    assert [n % 2**64 for n in ours] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_row_draws_the_same_beside_any_others_and_at_any_width() -> None:
    index = torch.tensor([7, 3, 400])
    wide = Streams(5, index)
    alone = Streams(5, index[1:2])
    for shape in ((2, 6), (4,)):
        first, second = wide.uniform(*shape), alone.uniform(*shape)
        assert torch.equal(first[1:2], second)
    assert torch.equal(Streams(5, index).uniform(9, 8)[:, :2, :6], Streams(5, index).uniform(2, 6))


def test_calls_rows_and_seeds_differ() -> None:
    streams = Streams(5, torch.arange(4))
    first, second = streams.uniform(8), streams.uniform(8)
    assert len({*first.flatten().tolist(), *second.flatten().tolist()}) == 64
    assert not (Streams(6, torch.arange(4)).uniform(8) == first).any()


def test_numbers_are_uniform_and_uncorrelated() -> None:
    for dtype in (torch.float, torch.double):
        draws = Streams(1, torch.arange(500)).uniform(20, 30, dtype=dtype)
        assert draws.dtype == dtype
        assert draws.min() >= 0
        assert draws.max() < 1
        n = draws.numel()
        counts = (draws.flatten() * 16).long().bincount(minlength=16).double()
        chi_squared = float(((counts - n / 16) ** 2 / (n / 16)).sum())
        assert chi_squared < 45, "15 degrees of freedom: beyond 45 once in 10^4"
        centred = draws.double() - 0.5
        for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2)):
            assert abs(float((centred * shifted).mean() * 12)) < 5 / n**0.5
