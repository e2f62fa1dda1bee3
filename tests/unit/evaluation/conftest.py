"""An evaluation of the base model and a training run, made once for all tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import train_here
from tests.unit.evaluation.helpers import (
    evaluated,
)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation of the base model that nothing interrupted."""
    folder = tmp_path_factory.mktemp("evaluations") / "whole"
    evaluated(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that kept two checkpoints beside best and last."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return train_here(
        folder, "mu=2", "task.eval_size=8", "trainer.keep_every=4", "trainer.prompts_per_rollout=2"
    )
