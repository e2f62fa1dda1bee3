"""The parts of an update: its batch, backward passes over processes, prompts left to do, checkpoints."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from spg.algorithms.objectives import ObjectiveResult
from spg.core.errors import RunError
from spg.core.types import UpdateBatch
from spg.core.world import World
from spg.training.module import Training
from spg.training.update import BackwardPasses
from tests.helpers import small_policy
from tests.unit.algorithms.test_invariance import batch, training


def module_of(mu: int = 1, max_updates: int = 1) -> Training:
    module = training(small_policy(), "mixture", None)
    module.mu, module.max_updates = mu, max_updates
    return module


def test_a_batch_of_some_sequences_stands_by_itself() -> None:
    experience, samples = batch(0)
    old = torch.arange(samples.scored.numel(), dtype=torch.float).view(samples.scored.shape)
    whole = UpdateBatch.of(experience, samples, old=old)
    assert whole.cohort.own == slice(0, len(experience.rewards))
    rows = torch.tensor([3, 1])
    some = whole.select(rows)
    assert torch.equal(some.experience.advantages, experience.advantages[rows])
    assert torch.equal(some.samples.tokens, samples.tokens[rows])
    assert torch.equal(some.cohort.lengths, samples.lengths[rows])
    assert some.cohort.own == slice(0, 2)
    assert some.old is not None
    assert torch.equal(some.old, old[rows])
    assert some.reference is None


def test_figures_pass_no_gradient_on() -> None:
    leaf = torch.ones(3, requires_grad=True)
    result = ObjectiveResult((2 * leaf).sum(), {"double": 2 * leaf})
    assert result.loss.requires_grad
    assert not result.figures["double"].requires_grad


class TwoProcesses(World):
    """A process beside one that makes `other` backward passes."""

    def __init__(self, other: int) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, torch.full_like(rows, self.other)])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("own", "other", "all_exchange", "expected"),
    [
        (3, 5, False, ["alone", "alone", "exchanged"]),
        (0, 2, False, ["exchanged"]),
        (0, 0, False, []),
        (1, 3, True, ["alone", "alone", "exchanged"]),
        (3, 1, True, ["alone", "alone", "exchanged"]),
    ],
)
def test_processes_exchange_gradients_equally_often(
    own: int, other: int, all_exchange: bool, expected: list[str]
) -> None:
    """The last pass exchanges; with sliced weights every process makes as many passes as the others."""
    made, alone = [], [False]

    @contextmanager
    def without_exchange():
        alone[0] = True
        yield
        alone[0] = False

    def backward(loss: Tensor) -> None:
        made.append(("alone" if alone[0] else "exchanged", float(loss)))

    passes = BackwardPasses(TwoProcesses(other), backward, without_exchange, all_exchange)
    losses = (torch.tensor(1.0) for _ in range(own))
    passes.run(losses, own, lambda: torch.tensor(0.0), torch.device("cpu"))
    assert [kind for kind, _ in made] == expected
    assert [loss for _, loss in made] == [2.0] * own + [0.0] * (len(made) - own), "processes average"


def test_the_prompts_left_to_do_follow_the_rollouts_done() -> None:
    module = module_of(mu=4, max_updates=10)
    assert list(module.remaining_prompts()) == [module.prompts.examples(n) for n in (0, 1, 2)]
    # the third rollout gave two updates only; with a higher limit the run goes on with the fourth
    module.rollouts, module.updates, module.max_updates = 3, 10, 15
    assert list(module.remaining_prompts()) == [module.prompts.examples(n) for n in (3, 4)]
    module.updates = 15
    assert list(module.remaining_prompts()) == []


def checkpoint_of(module: Training) -> dict:
    state = {name: tensor.clone() for name, tensor in module.weights.tensors().items()}
    checkpoint = {"loops": {}, "state_dict": {**state, "policy.frozen": torch.zeros(1)}}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_holds_what_is_trained_and_counters() -> None:
    module = module_of()
    module.rollouts, module.updates, module.latest = 2, 1, {"reward": 0.5}
    checkpoint = checkpoint_of(module)
    assert "loops" not in checkpoint
    assert checkpoint["state_dict"].keys() == module.weights.tensors().keys()
    other = module_of()
    other.on_load_checkpoint(checkpoint)
    assert (other.rollouts, other.updates, other.latest) == (2, 1, {"reward": 0.5})
    assert other.elapsed() > module.earlier


def test_a_checkpoint_of_version_0_5_names_its_parts_by_their_old_paths() -> None:
    module = module_of()
    module.identity = {"masking._target_": "spg.masking.BlockRandom", "mu": "4"}
    checkpoint = checkpoint_of(module)
    module.identity = {"masking._target_": "spg.algorithms.masking.BlockRandom", "mu": "4"}
    module.on_load_checkpoint(checkpoint)
    module.identity = {"masking._target_": "spg.algorithms.masking.BlockAll", "mu": "4"}
    with pytest.raises(RunError, match=r"masking._target_=.*BlockRandom, this one has .*BlockAll; resume"):
        module.on_load_checkpoint(checkpoint)


def test_weights_are_copied_and_loaded_whole() -> None:
    module = module_of()
    before = module.weights.copies()
    name = next(iter(before))
    with torch.no_grad():
        module.weights.tensors()[name].add_(1.0)
    assert not torch.equal(module.weights.whole()[name], before[name])
    module.weights.load(before)
    assert torch.equal(module.weights.whole()[name], before[name])
    with pytest.raises(
        RunError, match=f"{name} is missing in it and .* here; give a checkpoint of this model"
    ):
        module.weights.load({other: tensor for other, tensor in before.items() if other != name})
