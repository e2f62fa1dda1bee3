"""The processes of a run: every item belongs to one of them, in order."""

import pytest
import torch

from spg.core.world import World


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 3), (2, 5), (0, 2), (6, 1)])
def test_stretches_hold_every_item_once_in_order(count: int, size: int) -> None:
    stretches = [World(rank, size).stretch(count) for rank in range(size)]
    assert [item for stretch in stretches for item in stretch] == list(range(count))
    lengths = [len(stretch) for stretch in stretches]
    assert max(lengths) - min(lengths) <= 1


def test_a_share_is_the_stretch_of_the_items() -> None:
    assert World(1, 3).share("abcdef") == "cd"
    assert World().share(["a", "b"]) == ["a", "b"]


def test_one_process_gathers_its_own() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(World().gather(rows), rows)
    assert World().gather_items(("a", "b")) == ["a", "b"]
