"""The committed results are what the command makes of the committed rows, and the page shows them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from spg import config
from spg.cli.figures import report_sweep
from spg.reports.pages import fill_page
from spg.runs.multirun import read_rows, read_sweep
from tests.helpers import ROOT

RESULTS = ROOT / "results"
NAMES = sorted(path.parent.name for path in RESULTS.glob("*/runs.csv"))


PAGES = {
    "README.md": ["beta", "block_size", "estimator", "omega"],
    "methods.md": ["methods_countdown", "methods_countdown_lr", "methods_sudoku", "methods_sudoku_lr"],
}


def test_the_ablations_and_the_methods_are_there() -> None:
    assert sorted(name for names in PAGES.values() for name in names) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_made_of_their_rows(name: str, tmp_path: Path) -> None:
    made = tmp_path / name
    report_sweep(RESULTS / name, made, "accuracy", 50)
    for file in ("table.md", "table.csv"):
        assert (made / file).read_text() == (RESULTS / name / file).read_text()
    rows, sweep = read_rows(RESULTS / name), read_sweep(RESULTS / name)
    assert all(row["state"] == "finished" for row in rows)
    grid = name.endswith("_lr")  # from one seed, for a choice of the learning rate
    assert f"-cn {name.removesuffix('_lr')} " in sweep.command + " "
    settings = {tuple(row[key] for key in sweep.keys) for row in rows}
    for setting in settings:
        seeds = [row["seed"] for row in rows if tuple(row[key] for key in sweep.keys) == setting]
        assert len(set(seeds)) >= (1 if grid else 5 if name.startswith("methods") else 3)
    for figure in ("accuracy",) if grid else ("accuracy", "reward", "grad_norm"):
        assert (RESULTS / name / f"{figure}.png").stat().st_size < 300_000


@pytest.mark.parametrize("name", PAGES)
def test_the_page_shows_the_tables_as_they_are(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(RESULTS, copy)
    assert sorted(fill_page(copy / name)) == PAGES[name]
    assert (copy / name).read_text() == (RESULTS / name).read_text()


@pytest.mark.long
@pytest.mark.parametrize("task", ["sudoku", "countdown"])
def test_each_method_has_the_learning_rate_that_validation_chose(task: str) -> None:
    best: dict[str, tuple[float, float]] = {}
    for row in read_rows(RESULTS / f"methods_{task}_lr"):
        found = (float(row["validation.best"]), float(row["optimizer.lr"]))
        best[row["algorithm"]] = max(found, best.get(row["algorithm"], found))
    assert len(best) >= 10
    for method, (_, lr) in best.items():
        cfg = config.compose("config", [f"task={task}", f"algorithm={method}"])
        assert cfg.optimizer.lr == lr, method


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
    for page_name in PAGES:
        for name in re.findall(r"\]\((.*?\.png)\)", (RESULTS / page_name).read_text()):
            assert (RESULTS / name).is_file(), name
