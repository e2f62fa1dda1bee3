"""Advantages in closed form."""

from __future__ import annotations

import pytest
import torch

from spg.algorithms.advantages import Advantage, GroupMean, LeaveOneOut, Normalized, Raw, Shifted

REWARDS = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2], [3.0, 1.0, 2.0, 6.0]])


def test_group_mean() -> None:
    advantages = GroupMean()(REWARDS)
    assert torch.allclose(advantages[0], torch.tensor([0.5, -0.5, 0.0, 0.0]))
    assert torch.equal(advantages[1], torch.zeros(4)), "equal rewards teach nothing"
    assert torch.allclose(advantages.sum(-1), torch.zeros(3), atol=1e-6)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    advantages = LeaveOneOut()(REWARDS)
    for row, result in zip(REWARDS, advantages, strict=True):
        for i in range(4):
            others = torch.cat([row[:i], row[i + 1 :]]).mean()
            assert float(result[i]) == pytest.approx(float(row[i] - others), abs=1e-6)
    assert torch.allclose(advantages, GroupMean()(REWARDS) * 4 / 3)
    with pytest.raises(ValueError, match="group_size=1"):
        LeaveOneOut()(torch.ones(3, 1))


def test_normalized_has_unit_spread() -> None:
    """The spread divides by n - 1; where all rewards are equal, `eps` keeps the result 0."""
    advantages = Normalized(eps=1e-8)(REWARDS)
    assert torch.allclose(advantages[[0, 2]].std(-1), torch.ones(2), atol=1e-5)
    assert torch.equal(advantages[1], torch.zeros(4))
    damped = Normalized(eps=0.5)(REWARDS)[2]
    assert torch.allclose(damped, (REWARDS[2] - 3) / (REWARDS[2].std() + 0.5))
    with pytest.raises(ValueError, match=r"eps=0 is out of range; allowed: a number above 0"):
        Normalized(eps=0)


def test_shifted_by_the_minimum_of_the_batch() -> None:
    advantages = Shifted(GroupMean())(REWARDS)
    assert float(advantages.min()) == 0.0
    assert torch.allclose(advantages - GroupMean()(REWARDS), torch.full((3, 4), 2.0))
    assert torch.allclose(Shifted(LeaveOneOut())(REWARDS), advantages * 4 / 3)


def test_raw_rewards_and_what_is_shifted() -> None:
    """The minimum is the batch's, also of rewards themselves and of normalized advantages."""
    assert torch.equal(Raw()(REWARDS), REWARDS)
    assert torch.allclose(Shifted(Raw())(REWARDS - 1), REWARDS)
    base = Normalized()(REWARDS)
    shifted = Shifted(Normalized())(REWARDS)
    assert torch.allclose(shifted, base + base.min().abs())
    assert float(shifted[1].min()) > 0, "a group of equal rewards is raised like any"


@pytest.mark.parametrize("advantage", [GroupMean(), LeaveOneOut(), Normalized(), Raw()])
def test_groups_know_nothing_of_each_other(advantage: Advantage) -> None:
    alone = torch.cat([advantage(row.unsqueeze(0)) for row in REWARDS])
    assert torch.allclose(alone, advantage(REWARDS))
