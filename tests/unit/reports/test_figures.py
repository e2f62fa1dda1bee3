"""Multiruns read again: points over seeds, tables and figures, from jobs or from committed files."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from spg import config
from spg.cli import figures
from spg.cli.figures import report_sweep
from spg.config import ConfigError
from spg.core.console import console
from spg.core.statistics import bootstrap
from spg.reports import tables
from spg.reports.pages import fill_page
from spg.reports.points import RESAMPLES, Point, best, points
from spg.runs import multirun as sweeps
from tests.helpers import ROOT
from tests.unit.reports.sweeps import COMMAND, RESULTS, make_job, make_sweep


def by_setting(points: list[Point]) -> dict[tuple[Any, ...], Point]:
    return {tuple(point.setting.values()): point for point in points}


def test_points_average_over_seeds(sweep: Path) -> None:
    averages = points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    found = by_setting(averages)
    assert list(found) == list(RESULTS)
    point = found["eubo", 0.5]
    assert (point.seeds, point.values) == ([0, 1, 2], [0.5, 0.6, 0.4])
    assert point.mean == pytest.approx(0.5)
    assert point.sd == pytest.approx(0.1)  # n - 1
    assert point.validation == pytest.approx(0.5)
    assert found["mixture", 0.5].validation == pytest.approx(0.8)
    solved = by_setting(points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "solved"))
    assert solved["eubo", 0.5].mean == pytest.approx(0.25)
    over_beta = points(sweeps.read_rows(sweep), ["estimator", "seed"], "accuracy")
    assert [len(point.values) for point in over_beta] == [6, 6]


def test_bootstrap_interval_is_the_percentiles_of_all_resamples() -> None:
    values = np.array([0.1, 0.4, 0.5, 0.9])
    # all 4^4 resamples, equally likely, instead of 10,000 drawn ones
    means = np.array([values[list(np.unravel_index(i, (4,) * 4))].mean() for i in range(4**4)])
    low, high = bootstrap(values, RESAMPLES)
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.03)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.03)
    assert bootstrap(values, RESAMPLES) == (low, high)
    assert bootstrap(np.full(3, 0.25), RESAMPLES) == (0.25, 0.25)
    wide = bootstrap(np.random.default_rng(1).normal(size=400), RESAMPLES)
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "omega", ["omega"])
    make_job(folder, "0", {"omega": 0.5}, **{"accuracy.after": 0.5, "validation.best": 0.4, "seed": 7})
    (point,) = points(sweeps.read_rows(folder), ["omega"], "accuracy")
    assert (point.interval, point.sd, point.seeds) == (None, None, [7])
    assert tables.cells(point) == ["0.5", "1", "0.500", "-", "-", "0.400"]


def test_the_best_is_chosen_on_the_validation_half(sweep: Path) -> None:
    averages = points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    marked = best(averages)
    assert marked is not None
    assert marked.setting == {"estimator": "mixture", "beta": 0.5}
    assert max(averages, key=lambda point: point.mean) is not marked, "the case would tell nothing"
    text = tables.table_markdown(averages, sweeps.read_sweep(sweep), "accuracy", "")
    (bold,) = [line for line in text.splitlines() if line.startswith("| **")]
    assert bold.startswith("| **mixture** | **0.5** | **3** | **0.710** |")
    rows = list(csv.DictReader(tables.table_csv(averages, sweeps.read_sweep(sweep), "accuracy").splitlines()))
    assert [row["best"] for row in rows] == ["0", "0", "1", "0"]
    assert float(rows[2]["accuracy.mean"]) == pytest.approx(0.71)
    assert rows[2]["seeds"] == "0 1 2"


def test_jobs_that_did_not_finish_are_left_out_and_named(
    sweep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failed = make_job(sweep, "a", {"estimator": "eubo", "beta": 0.5, "seed": 3}, state="failed")
    (failed / "summary.json").write_text('{"accuracy.after": 0.9}')  # of an earlier attempt
    make_job(sweep, "b", {"estimator": "eubo", "beta": 0.5, "seed": 4}, state="running")
    (sweep / "estimator-eubo_beta-0.5_seed-2" / "summary.json").unlink()
    caplog.set_level("INFO")
    report_sweep(sweep, sweep / "figures", "accuracy", 4)
    note = "Left out: 3 of 14 jobs (1 without result, 1 failed, 1 running): "
    note += "estimator-eubo_beta-0.5_seed-2, a, b."
    assert note in caplog.text
    assert note in (sweep / "figures" / "table.md").read_text()
    rows = list(csv.DictReader((sweep / "figures" / "table.csv").open()))
    assert (rows[0]["n"], rows[0]["seeds"]) == ("2", "0 1")
    assert float(rows[0]["accuracy.mean"]) == pytest.approx(0.55)


def test_runs_csv_holds_a_row_a_job(sweep: Path) -> None:
    make_job(sweep, "a", {"estimator": "eubo", "beta": 0.5, "seed": 3}, state="failed")
    path = sweeps.write_runs(sweep)
    assert path == sweep / "runs.csv"
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == (
        "job state estimator beta seed accuracy.before accuracy.after accuracy.last solved.before "
        "solved.after solved.last validation.best best.update updates seconds error"
    ).split(" ")
    assert len(rows) == 13
    assert rows[0]["job"] == "estimator-eubo_beta-0.5_seed-0"
    assert rows[3]["job"] == "a"
    assert rows[3]["error"] == "NonFinite: the loss is nan; lower optimizer.lr"
    assert (rows[3]["state"], rows[3]["accuracy.after"], rows[3]["updates"]) == ("failed", "", "8")
    assert not list(sweep.glob("*.tmp"))
    assert sweeps.read_runs_csv(path) == sweeps.read_rows(sweep)


def test_jobs_are_ordered_by_value(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", ["size", "seed"])
    for i, size in enumerate([12, 4, 0.25, 0.5]):
        make_job(folder, f"{i}", {"size": size, "seed": 0})
    assert [job.overrides["size"] for job in sweeps.read_jobs(folder)] == [0.25, 0.5, 4, 12]


@pytest.mark.parametrize(
    ("value", "back"),
    [(1, 1), (0.5, 0.5), (None, None), (True, "true"), ("0_1", "0_1"), ("eubo", "eubo"), ([1, 2], "[1, 2]")],
)
def test_values_of_swept_keys_survive_the_file(tmp_path: Path, value: Any, back: Any) -> None:
    folder = make_sweep(tmp_path / "s", ["key"])
    make_job(folder, "0", {"key": value})
    assert sweeps.read_rows(folder)[0]["key"] == back
    assert sweeps.read_runs_csv(sweeps.write_runs(folder))[0]["key"] == back


def test_committed_files_alone_are_enough(
    sweep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report_sweep(sweep, tmp_path / "results" / "beta", "accuracy", 4)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("runs.csv", "sweep.json"):
        (kept / name).write_bytes((tmp_path / "results" / "beta" / name).read_bytes())
    caplog.set_level("INFO")
    paths = report_sweep(kept, kept, "accuracy", 4)
    assert {path.name for path in paths} == {
        "runs.csv",
        "sweep.json",
        "table.md",
        "table.csv",
        "accuracy.png",
    }
    assert "need the jobs' own metrics.csv" in caplog.text
    for name in ("runs.csv", "sweep.json", "table.md", "table.csv"):
        assert (kept / name).read_bytes() == (tmp_path / "results" / "beta" / name).read_bytes()


def test_errors_name_the_remedy(sweep: Path, tmp_path: Path) -> None:
    def answer(folder: Path, measure: str = "accuracy") -> str:
        with pytest.raises(ConfigError) as caught:
            report_sweep(folder, tmp_path / "out", measure, 4)
        return str(caught.value)

    assert "is not a directory" in answer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no sweep.json" in answer(tmp_path / "empty")
    assert answer(sweep, "length").endswith("allowed: accuracy, solved")
    failed = make_sweep(tmp_path / "failed", ["beta", "seed"])
    assert f"no job has begun); run the same command again to go on: {COMMAND}" in answer(failed)
    for i, state in enumerate(["failed", "failed", "interrupted"]):
        make_job(failed, str(i), {"beta": 1, "seed": i}, state=state)
    assert "(2 failed, 1 interrupted); run the same command again" in answer(failed)
    (failed / "0" / "status.json").write_text("{")
    assert "(1 of unknown state, 1 failed, 1 interrupted)" in answer(failed)
    assert not (tmp_path / "out").exists()


def test_a_page_is_filled_again(tmp_path: Path) -> None:
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "table.md").write_text("| new \\1 |\n")
    path = tmp_path / "README.md"
    path.write_text("Before\n\n<!-- table:beta -->\n| old |\n<!-- /table:beta -->\n\nAfter\n")
    assert fill_page(path) == ["beta"]
    filled = "Before\n\n<!-- table:beta -->\n\n| new \\1 |\n\n<!-- /table:beta -->\n\nAfter\n"
    assert path.read_text() == filled
    fill_page(path)
    assert path.read_text() == filled
    for text, words in (
        (
            "<!-- table:beta -->\n<!-- /table:beta -->\n<!-- table:omega -->\n<!-- /table:omega -->",
            "omega/table",
        ),
        ("<!-- table:beta -->\n| old |\n", "table:beta has no end"),
        ("nothing", "no table is marked"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            fill_page(path)
        assert path.read_text() == text
    with pytest.raises(ConfigError, match="is not a file"):
        fill_page(tmp_path / "none.md")


def test_jobs_are_shown(sweep: Path) -> None:
    make_job(sweep, "a", {"estimator": "eubo", "beta": 0.5, "seed": 3}, state="failed")
    with console.capture() as capture:
        tables.show_jobs(sweep)
    text = capture.get()
    assert "beta: 12 of 13 jobs finished" in text
    assert "a failed: NonFinite: the loss is nan; lower optimizer.lr" in text
    (line,) = [line for line in text.splitlines() if line.split()[1:4] == ["mixture", "0.5", "1"]]
    assert line.split() == ["finished", "mixture", "0.5", "1", "0.900", "0.710", "0.355", "12"]


def test_the_best_is_bold_on_the_terminal(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(force_terminal=True, width=100)
    monkeypatch.setattr(tables, "console", terminal)
    averages = points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    with terminal.capture() as capture:
        tables.show_points(averages, sweeps.read_sweep(sweep), "accuracy")
    lines = [line for line in capture.get().splitlines() if "eubo" in line or "mixture" in line]
    assert [line.startswith("\x1b[1m") for line in lines] == [False, False, True, False]


def test_the_command(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "spg.figures", f"sweep={sweep}", "measure=solved", "window=4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "work", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert "0.355" in done.stdout
    drawn = "runs.csv, sweep.json, table.csv, table.md, solved.png, reward.png, reward_panels.png, "
    drawn += "grad_norm.png, grad_norm_panels.png"
    assert drawn in done.stdout
    assert (sweep / "figures" / "solved.png").stat().st_size > 10_000
    assert not list((tmp_path / "work").iterdir()), "Hydra left something behind"


def test_mistakes_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="nothing to do"):
        figures.job(config.compose("figures", []))
    with pytest.raises(ConfigError, match="window=0"):
        config.compose("figures", ["window=0"])
    with pytest.raises(ConfigError, match="nearest: measure"):
        config.compose("figures", ["mesure=solved"])


def test_reading_sweeps_needs_no_heavy_library() -> None:
    code = "import sys; import spg.runs.multirun, spg.cli.figures\n"
    code += "print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
