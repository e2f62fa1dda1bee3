"""How an update is cut: what is read from the device, padding, pieces of whole sequences and groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spg.algorithms.estimators import ELBO, Mixture, Sandwich
from spg.algorithms.masking import BlockRandom
from spg.algorithms.objectives import DPO, SPG, WD1, ObjectiveResult, coupling
from spg.core.types import UpdateBatch
from spg.core.world import World
from spg.planning.phantom import Ledger
from spg.training.pieces import Copies
from spg.training.update import BackwardPasses, ExactGradient
from tests.helpers import small_policy
from tests.unit.algorithms.test_invariance import batch as made_up

SUMS = ELBO("elbo_weight")


def batch_of(counts: list[int], groups: list[int]) -> UpdateBatch:
    """Return a batch whose sequences score something in the first `counts` of their draws."""
    experience, samples = made_up(0)
    experience = replace(experience, rollout=replace(experience.rollout, group=torch.tensor(groups)))
    some = (torch.arange(3) < torch.tensor(counts).unsqueeze(-1)).unsqueeze(-1) & samples.region.unsqueeze(1)
    return UpdateBatch.of(experience, replace(samples, scored=some))


def copies(counts: list[int], groups: list[int]) -> Copies:
    return Copies.of(batch_of(counts, groups), torch.ones(6, dtype=torch.bool))


COUNTS, PAIRS = [3, 0, 2, 1, 3, 1], [0, 0, 1, 1, 2, 2]


def test_copies_that_score_nothing_or_teach_nothing_are_left_out() -> None:
    learned = torch.tensor([True, True, True, True, False, True])
    found = Copies.of(batch_of(COUNTS, PAIRS), learned)
    assert found.rows.tolist() == [0, 0, 0, 2, 2, 3, 5]
    assert found.draws.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert found.counts == [3, 0, 2, 1, 0, 1]
    assert [len(piece.rows) for piece in found.cut(3)] == [3, 3, 1]
    assert [len(piece.rows) for piece in found.cut(None)] == [7]
    none = Copies.of(batch_of(COUNTS, PAIRS), torch.zeros(6, dtype=torch.bool))
    assert none.cut(3) == none.cut(None) == []


@pytest.mark.parametrize(
    ("couples", "size", "expected"),
    [
        ("sequence", 3, [(0, 2, 3), (2, 4, 3), (4, 5, 3), (5, 6, 1)]),
        ("sequence", 5, [(0, 3, 5), (3, 6, 5)]),
        ("sequence", 2, None),  # three draws of one sequence
        ("group", 4, [(0, 2, 3), (2, 4, 3), (4, 6, 4)]),
        ("group", 6, [(0, 4, 6), (4, 6, 4)]),
        ("group", 3, None),
        ("batch", 100, None),
    ],
)
def test_pieces_hold_whole_sequences_or_groups(couples, size, expected) -> None:
    found = copies(COUNTS, PAIRS).cut_whole(size, couples)
    if expected is None:
        assert found is None
        return
    assert [(rows.start, rows.stop, len(piece.rows)) for rows, piece in found] == expected
    assert torch.equal(torch.cat([p.rows for _, p in found]), copies(COUNTS, PAIRS).rows)
    for rows, piece in found:
        assert all(rows.start <= row < rows.stop for row in piece.rows.tolist())


def test_a_group_in_several_stretches_is_no_piece() -> None:
    apart = copies(COUNTS, [0, 1, 0, 1, 2, 2])
    assert apart.cut_whole(10, "group") is None
    assert apart.cut_whole(5, "sequence") is not None


def test_the_padding_of_a_piece_is_known_beforehand() -> None:
    batch = batch_of(COUNTS, PAIRS)
    rollout = batch.experience.rollout
    for piece in Copies.of(batch, torch.ones(6, dtype=torch.bool)).cut(4):
        mask = rollout.attention_mask[piece.rows]
        assert piece.padding == int((~mask.any(0)).sum())
        assert piece.padded == (not bool(mask[:, piece.padding :].all()))


def test_a_part_keeps_the_cohort_of_the_whole() -> None:
    experience, samples = made_up(0)
    whole = UpdateBatch.of(experience, samples, old=torch.zeros(6, 3, 8), world=Beside())
    part = whole.part(slice(2, 4))
    assert part.is_part
    assert part.cohort.own == slice(8, 10), "after the six sequences of the process before"
    assert torch.equal(part.cohort.lengths, whole.cohort.lengths)
    assert torch.equal(part.experience.advantages, experience.advantages[2:4])
    assert part.experience.rollout.texts == experience.rollout.texts[2:4]
    assert torch.equal(part.samples.scored, samples.scored[2:4])
    assert part.old is not None
    assert part.old.shape == (2, 3, 8)
    assert part.reference is None


class Beside(World):
    """The second of two processes, the first of which has the same numbers."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows])


def test_what_a_class_says_of_its_loss_does_not_hold_for_another_loss() -> None:
    class Same(WD1):
        """Changes the weights alone."""

    class Other(WD1):
        def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
            raise NotImplementedError

    class Wrong(WD1):
        couples = "pairs"

    assert coupling(WD1(SUMS)) == coupling(Same(SUMS)) == "sequence"
    assert coupling(DPO(SUMS, 0.1)) == "group"
    assert coupling(Other(SUMS)) == "batch"
    with pytest.raises(
        ValueError, match="Wrong has couples='pairs'; set it to one of sequence, group, batch"
    ):
        coupling(Wrong(SUMS))


class Joined(SPG):
    """Joins all sequences in its loss, which no sum over parts is."""

    def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
        result = super().__call__(token_logps, batch)
        return ObjectiveResult((3 * result.loss).exp(), result.figures)


def test_a_loss_that_joins_all_sequences_takes_two_passes() -> None:
    gradients = []
    for size in (None, 6):
        policy = small_policy()
        gradient = ExactGradient(policy, Joined(Sandwich(ELBO(), Mixture(1.5, 0.5))), size)
        gradient.add(UpdateBatch.of(*made_up(1)))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_an_adaptive_objective_learns_from_whole_updates() -> None:
    """The draws that it compares are those of all sequences, not those of the last piece."""
    learned = []
    for size in (None, 6, 3, 2):  # one pass; two and six pieces of whole sequences; two passes
        policy = small_policy()
        objective = SPG(Sandwich(ELBO(), Mixture(1.5, "auto")))
        gradient = ExactGradient(policy, objective, size)
        experience, samples = made_up(1)
        again = BlockRandom(4, 3)(experience.rollout, policy.mask_id, 9)
        for drawn in (samples, again):
            figures = gradient.add(UpdateBatch.of(experience, drawn)).figures
        means = {name: float(figure.mean()) for name, figure in figures.items()}
        assert means["omega/known"] > 0
        objective.adapt(means)
        learned.append(torch.tensor(objective.state()["omega"], dtype=torch.double))
    assert all(torch.allclose(one, learned[0], rtol=1e-5) for one in learned)


@pytest.mark.parametrize(("all_exchange", "passes"), [(False, 4), (True, 5)])
def test_a_process_makes_as_many_passes_as_its_parts_and_the_others_need(
    all_exchange: bool, passes: int
) -> None:
    made: list[float] = []

    def backward(loss: Tensor) -> None:
        made.append(float(loss.detach()))
        loss.backward()

    class Busier(Beside):
        def gather(self, rows: Tensor) -> Tensor:
            return torch.cat([rows, torch.full_like(rows, 5)]) if len(rows) == 1 else super().gather(rows)

    policy = small_policy()
    world = Busier()
    batch = UpdateBatch.of(*made_up(1), world=world)
    gradient = ExactGradient(policy, SPG(Sandwich(ELBO(), Mixture(1.5, 0.5))), 4)
    parts = Copies.of(batch, gradient.objective.learns_from(batch.experience)).cut_whole(4, "sequence")
    assert parts is not None
    result = gradient.add(batch, BackwardPasses(world, backward, all_exchange=all_exchange))
    assert len(made) == max(len(parts), passes if all_exchange else 1)
    assert sum(made) == pytest.approx(2 * float(result.loss), abs=1e-5), "processes average"


def test_one_pass_needs_no_more_memory_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all tensors alive, at their peak: those of one piece and its gradients."""
    peaks = []
    for two_passes in (False, True):
        if two_passes:
            monkeypatch.setattr(Copies, "cut_whole", lambda *_: None)
        policy = small_policy()
        gradient = ExactGradient(policy, SPG(Sandwich(ELBO(), Mixture(1.5, 0.5))), 6)
        batch = UpdateBatch.of(*made_up(1))
        ledger = Ledger()
        ledger.hold_all(policy)
        before = ledger.begin()
        with ledger:
            gradient.add(batch)
        peaks.append(ledger.peak - before)
    assert peaks[0] < 1.03 * peaks[1]
