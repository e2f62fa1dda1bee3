"""A sweep over estimator, beta and seed, shared by the tests of tables and figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from spg.runs.multirun import MOMENTS
from tests.unit.reports.sweeps import RESULTS, make_job, make_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = make_sweep(tmp_path / "beta", ["estimator", "beta", "seed"])
    for (estimator, beta), (tests, validations) in RESULTS.items():
        for seed in range(3):
            summary = {f"accuracy.{moment}": tests[seed] for moment in MOMENTS}
            summary |= {f"solved.{moment}": tests[seed] / 2 for moment in MOMENTS}
            summary |= {"accuracy.after.interval": [0.0, 1.0], "validation.best": validations[seed]}
            overrides = {"estimator": estimator, "beta": beta, "seed": seed}
            make_job(folder, f"estimator-{estimator}_beta-{beta}_seed-{seed}", overrides, **summary)
    return folder
