"""What every objective has: the update's batch in, a loss and figures out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from spg.core.combinations import Couples, check_couples
from spg.core.types import Experience, UpdateBatch


@dataclass(frozen=True)
class ObjectiveResult:
    """What an objective returns.

    Attributes:
        loss: This process's share of the loss []; the sum over processes is the loss of the update.
        figures: Numbers to log {name: [B]}, valid for the sequences that are learned from. They pass no
            gradient on.
    """

    loss: Tensor
    figures: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        detached = {name: figure.detach() for name, figure in self.figures.items()}
        object.__setattr__(self, "figures", detached)


class Objective(Protocol):
    """What the update minimises.

    A class can declare facts for the configuration check (`spg.config.parts`): `needs_sums = True` if its
    estimator must return sums over tokens, `completions_per_prompt = 2` if it needs groups of that size.
    `couples` says which log-probabilities its loss joins, see `coupling`.

    Attributes:
        needs: What must be computed besides the policy's log-probabilities: `reference`, those of the
            model before training; `old`, those of the policy that made the rollout.
    """

    needs: frozenset[str]

    def learns_from(self, experience: Experience) -> Tensor:
        """Return bool [B]: True if the sequence's log-probabilities can change the loss.

        The other sequences get zeros for log-probabilities, but still count in every normaliser.
        """
        ...

    def __call__(self, token_logps: Tensor, batch: UpdateBatch) -> ObjectiveResult:
        """Compute the loss of this process's sequences.

        Args:
            token_logps: The policy's log-probabilities [B M T] in nats, 0 at positions that are not scored.
            batch: The sequences, their masks, what `needs` names, and the cohort of all processes, whose
                numbers normalise the loss. If it is a part of a larger batch (`is_part`), only the loss is
                used.
        """
        ...


def coupling(objective: Objective) -> Couples:
    """Return which log-probabilities the loss of an objective joins in other ways than by a sum.

    It is the class attribute `couples`. `sequence`: the loss is a sum over sequences, each of which depends
    on its own log-probabilities alone and on numbers of the cohort. `group`: a sum over groups. `batch`:
    anything, which also holds for a class that defines `__call__` and does not say.

    Raises:
        ValueError: if the attribute has another value.
    """
    for kind in type(objective).__mro__:
        if "couples" in vars(kind):
            return check_couples(vars(kind)["couples"], type(objective).__name__)
        if "__call__" in vars(kind):  # what a base class says holds for its own loss
            break
    return "batch"


@runtime_checkable
class Adaptive(Protocol):
    """What an objective has in addition to `Objective` if it learns numbers of its own between updates."""

    def adapt(self, means: Mapping[str, float]) -> dict[str, float]:
        """Learn, after an update's step, from its figures' means over all sequences; return what to log."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of what was learned."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state` back; an empty one is that of a new objective."""
        ...
