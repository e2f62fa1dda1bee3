"""The committed results are what the command makes of the committed rows, and the page shows them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from spg.figures import make, page
from spg.sweeps import read_rows, read_sweep
from tests.helpers import ROOT

RESULTS = ROOT / "results"
NAMES = sorted(path.parent.name for path in RESULTS.glob("*/runs.csv"))


def test_the_four_ablations_are_there() -> None:
    assert NAMES == ["beta", "block_size", "estimator", "omega"]


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_made_of_their_rows(name: str, tmp_path: Path) -> None:
    made = tmp_path / name
    make(RESULTS / name, made, "accuracy", 50)
    for file in ("table.md", "table.csv"):
        assert (made / file).read_text() == (RESULTS / name / file).read_text()
    rows, sweep = read_rows(RESULTS / name), read_sweep(RESULTS / name)
    assert all(row["state"] == "finished" for row in rows)
    assert f"-cn {name} " in sweep.command + " "
    settings = {tuple(row[key] for key in sweep.keys) for row in rows}
    for setting in settings:
        seeds = [row["seed"] for row in rows if tuple(row[key] for key in sweep.keys) == setting]
        assert len(set(seeds)) >= 3
    for figure in ("accuracy", "reward", "grad_norm"):
        assert (RESULTS / name / f"{figure}.png").stat().st_size < 300_000


def test_the_page_shows_the_tables_as_they_are(tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(RESULTS, copy)
    assert sorted(page(copy / "README.md")) == NAMES
    assert (copy / "README.md").read_text() == (RESULTS / "README.md").read_text()


def test_settings_that_two_sweeps_share_gave_the_same_numbers() -> None:
    def value(name: str, **wanted: object) -> float:
        (row,) = (r for r in read_rows(RESULTS / name) if all(str(r[k]) == str(v) for k, v in wanted.items()))
        return float(row["accuracy.after"])

    for seed in (1, 2, 3):
        mixtures = {
            value("estimator", estimator="mixture", seed=seed),
            value("omega", omega=0.5, seed=seed),
            value("beta", estimator="mixture", beta=1.5, seed=seed),
            value("block_size", block_size=12, seed=seed),
        }
        assert len(mixtures) == 1
        assert value("estimator", estimator="elbo", seed=seed) == value("omega", omega=0, seed=seed)
        eubo = value("estimator", estimator="eubo", seed=seed)
        assert (
            eubo == value("omega", omega=1, seed=seed) == value("beta", estimator="eubo", beta=1.5, seed=seed)
        )


def test_figures_that_the_page_names_exist() -> None:
    for name in re.findall(r"\]\((.*?\.png)\)", (RESULTS / "README.md").read_text()):
        assert (RESULTS / name).is_file(), name
