"""Multiruns read again: points over seeds, tables and figures, from jobs or from committed files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from spg import config
from spg.cli import figures
from spg.config import ConfigError
from spg.core.console import console
from spg.reports import plots
from spg.runs import multirun as sweeps
from tests.helpers import ROOT

COMMAND = "python -m spg.train -cd sweeps -cn beta"
# (estimator, beta): test accuracy and validation accuracy of seeds 0, 1, 2
RESULTS = {
    ("eubo", 0.5): ([0.50, 0.60, 0.40], [0.5, 0.5, 0.5]),
    ("eubo", 2.0): ([0.90, 0.80, 0.85], [0.60, 0.60, 0.60]),  # best on the test half
    ("mixture", 0.5): ([0.70, 0.71, 0.72], [0.8, 0.9, 0.7]),  # best on the validation half
    ("mixture", 2.0): ([0.30, 0.30, 0.30], [0.30, 0.40, 0.50]),
}


def make_sweep(folder: Path, swept: list[str], name: str = "beta") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"name": name, "command": COMMAND, "swept": swept}
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def make_job(
    sweep: Path, name: str, overrides: dict[str, Any], state: str = "finished", **summary: Any
) -> Path:
    """Make a job's directory: two updates a rollout, reward 0.1 per rollout and seed-dependent norms."""
    folder = sweep / name
    folder.mkdir()
    error = "NonFinite: the loss is nan; lower optimizer.lr" if state == "failed" else None
    status = {"state": state, "overrides": overrides, "updates": 8, "error": error}
    (folder / "status.json").write_text(json.dumps(status))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["update", "val/accuracy", "reward", "grad_norm"])
        writer.writeheader()
        writer.writerow({"update": 0, "val/accuracy": 0.3})
        for update in range(1, 9):
            reward = {"reward": 0.1 * update} if update % 2 else {}
            writer.writerow({"update": update, "grad_norm": 1 + overrides.get("seed", 0), **reward})
    if state == "finished":
        (folder / "summary.json").write_text(
            json.dumps({"updates": 8, "seconds": 12.5, "best.update": 4} | summary)
        )
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = make_sweep(tmp_path / "beta", ["estimator", "beta", "seed"])
    for (estimator, beta), (tests, validations) in RESULTS.items():
        for seed in range(3):
            summary = {f"accuracy.{moment}": tests[seed] for moment in sweeps.MOMENTS}
            summary |= {f"solved.{moment}": tests[seed] / 2 for moment in sweeps.MOMENTS}
            summary |= {"accuracy.after.interval": [0.0, 1.0], "validation.best": validations[seed]}
            overrides = {"estimator": estimator, "beta": beta, "seed": seed}
            make_job(folder, f"estimator-{estimator}_beta-{beta}_seed-{seed}", overrides, **summary)
    return folder


def by_setting(points: list[sweeps.Point]) -> dict[tuple[Any, ...], sweeps.Point]:
    return {tuple(point.setting.values()): point for point in points}


def test_points_average_over_seeds(sweep: Path) -> None:
    points = sweeps.points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    found = by_setting(points)
    assert list(found) == list(RESULTS)
    point = found["eubo", 0.5]
    assert (point.seeds, point.values) == ([0, 1, 2], [0.5, 0.6, 0.4])
    assert point.mean == pytest.approx(0.5)
    assert point.sd == pytest.approx(0.1)  # n - 1
    assert point.validation == pytest.approx(0.5)
    assert found["mixture", 0.5].validation == pytest.approx(0.8)
    solved = by_setting(sweeps.points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "solved"))
    assert solved["eubo", 0.5].mean == pytest.approx(0.25)
    over_beta = sweeps.points(sweeps.read_rows(sweep), ["estimator", "seed"], "accuracy")
    assert [len(point.values) for point in over_beta] == [6, 6]


def test_bootstrap_interval_is_the_percentiles_of_all_resamples() -> None:
    values = np.array([0.1, 0.4, 0.5, 0.9])
    # all 4^4 resamples, equally likely, instead of 10,000 drawn ones
    means = np.array([values[list(np.unravel_index(i, (4,) * 4))].mean() for i in range(4**4)])
    low, high = sweeps.bootstrap(values)
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.03)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.03)
    assert sweeps.bootstrap(values) == (low, high)
    assert sweeps.bootstrap(np.full(3, 0.25)) == (0.25, 0.25)
    wide = sweeps.bootstrap(np.random.default_rng(1).normal(size=400))
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "omega", ["omega"])
    make_job(folder, "0", {"omega": 0.5}, **{"accuracy.after": 0.5, "validation.best": 0.4, "seed": 7})
    (point,) = sweeps.points(sweeps.read_rows(folder), ["omega"], "accuracy")
    assert (point.interval, point.sd, point.seeds) == (None, None, [7])
    assert figures.cells(point) == ["0.5", "1", "0.500", "-", "-", "0.400"]


def test_the_best_is_chosen_on_the_validation_half(sweep: Path) -> None:
    points = sweeps.points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    best = sweeps.best(points)
    assert best is not None
    assert best.setting == {"estimator": "mixture", "beta": 0.5}
    assert max(points, key=lambda point: point.mean) is not best, "the case would tell nothing"
    text = figures.table_markdown(points, sweeps.read_sweep(sweep), "accuracy", "")
    (bold,) = [line for line in text.splitlines() if line.startswith("| **")]
    assert bold.startswith("| **mixture** | **0.5** | **3** | **0.710** |")
    rows = list(csv.DictReader(figures.table_csv(points, sweeps.read_sweep(sweep), "accuracy").splitlines()))
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
    figures.make(sweep, sweep / "figures", "accuracy", 4)
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
    figures.make(sweep, tmp_path / "results" / "beta", "accuracy", 4)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("runs.csv", "sweep.json"):
        (kept / name).write_bytes((tmp_path / "results" / "beta" / name).read_bytes())
    caplog.set_level("INFO")
    paths = figures.make(kept, kept, "accuracy", 4)
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
            figures.make(folder, tmp_path / "out", measure, 4)
        return str(caught.value)

    assert "is no directory" in answer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no sweep.json" in answer(tmp_path / "empty")
    assert answer(sweep, "length").endswith("allowed: accuracy, solved")
    failed = make_sweep(tmp_path / "failed", ["beta", "seed"])
    assert f"no job has begun); run the same command again to go on: {COMMAND}" in answer(failed)
    for i, state in enumerate(["failed", "failed", "interrupted"]):
        make_job(failed, str(i), {"beta": 1, "seed": i}, state=state)
    assert "(2 failed, 1 interrupted); run the same command again" in answer(failed)
    (failed / "0" / "status.json").write_text("{")
    assert "status.json can't be read as JSON" in answer(failed)
    assert not (tmp_path / "out").exists()


def test_rolling_window_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    updates = [int(u) for _ in range(3) for u in range(1, 61, 4)] + [7, 30]
    values = [float(v) for v in rng.normal(size=len(updates))]
    values[5] = float("nan")
    at, mean, sd = plots.rolling(updates, values, 10)
    assert at.tolist() == sorted(set(updates))
    pairs = list(zip(updates, values, strict=True))
    for u, m, s in zip(at, mean, sd, strict=True):
        inside = [v for w, v in pairs if u - 10 < w <= u and v == v]
        assert m == pytest.approx(sum(inside) / len(inside))
        assert s == pytest.approx(np.sqrt(sum((v - m) ** 2 for v in inside) / len(inside)), abs=1e-12)


def test_missing_rewards_are_no_zeros(sweep: Path) -> None:
    """Rewards 0.1, 0.3, 0.5, 0.7 stand in rows 1, 3, 5, 7 of 8; a window of 4 updates holds two."""
    make_job(sweep, "a", {"estimator": "eubo", "beta": 0.5, "seed": 8}, state="failed")
    series = plots._series(sweeps.read_jobs(sweep), ["estimator", "beta"], "reward", 4)
    setting, seeds, (at, mean, sd) = series[0]
    assert (setting, seeds) == ({"estimator": "eubo", "beta": 0.5}, 3)
    assert at.tolist() == [1, 3, 5, 7]
    np.testing.assert_allclose(mean, [0.1, 0.2, 0.4, 0.6])
    np.testing.assert_allclose(sd, [0, 0.1, 0.1, 0.1], atol=1e-12)
    _, _, (at, mean, _) = plots._series(sweeps.read_jobs(sweep), ["estimator", "beta"], "grad_norm", 4)[0]
    assert at.tolist() == list(range(1, 9))
    np.testing.assert_allclose(mean, 2.0)  # over seeds: 1, 2, 3
    assert plots._series(sweeps.read_jobs(sweep), ["beta"], "no/such", 4) == []


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lines": [{"estimator": e, "beta": b} for e in ("eubo", "mixture") for b in (0.5, 0.75, 1, 1.5, 2)],
    "one line": [{"omega": w} for w in (0, 0.25, 0.5, 0.75, 1)],
    "bars": [{"estimator": e} for e in ("zero", "elbo", "eubo", "mixture")],
    "two keys": [{"estimator": e, "masking": m} for e in plots.METHODS for m in ("random", "full")],
    "two numbers": [{"beta": b, "omega": w} for b in (1, 1.5) for w in (0, 0.5, 1)],
    "seeds only": [{}],
    "null": [{"size": None}, {"size": 4}],
}


@pytest.mark.parametrize("case", SETTINGS)
def test_figures_are_drawn(case: str, tmp_path: Path) -> None:
    keys = list(SETTINGS[case][0])
    folder = make_sweep(tmp_path / "s", [*keys, "seed"])
    for i, setting in enumerate(SETTINGS[case]):
        for seed in range(2):
            summary = {"accuracy.after": 0.1 * seed + 0.01 * i, "validation.best": 0.5}
            make_job(folder, f"{i}-{seed}", setting | {"seed": seed}, **summary)
    paths = figures.make(folder, folder / "figures", "accuracy", 4)
    assert [path.name for path in paths[-3:]] == ["accuracy.png", "reward.png", "grad_norm.png"]
    for path in paths[-3:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert not matplotlib.pyplot.get_fignums(), "figures stay open"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the figures instead of writing them."""
    kept: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure) or path)
    yield kept
    matplotlib.pyplot.close("all")


def test_methods_keep_their_colour(sweep: Path, drawn: list[Any], tmp_path: Path) -> None:
    assert len({(colour, marker) for _, colour, marker in plots.METHODS.values()}) == len(plots.METHODS)
    assert len({colour for _, colour, _ in plots.METHODS.values()}) == len(plots.METHODS)
    rows = sweeps.read_rows(sweep)
    plots.sweep_figure(sweeps.points(rows, ["estimator", "beta"], "accuracy"), "accuracy", "s", tmp_path)
    plots.sweep_figure(sweeps.points(rows, ["estimator"], "accuracy"), "accuracy", "s", tmp_path)
    plots.dynamics_figure(sweeps.read_jobs(sweep), ["estimator"], "s", tmp_path, "reward", 4)
    lines, bars, dynamics = (figure.axes[0] for figure in drawn)
    expected = [plots.METHODS[name][1] for name in ("eubo", "mixture")]
    to_hex = matplotlib.colors.to_hex
    drawn_lines = [c.lines[0] for c in lines.containers]
    assert [to_hex(line.get_color()).upper() for line in drawn_lines] == expected
    assert [line.get_marker() for line in drawn_lines] == [
        plots.METHODS[name][2] for name in ("eubo", "mixture")
    ]
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars.patches] == expected
    assert [to_hex(line.get_color()).upper() for line in dynamics.lines] == expected
    others = [plots.style(name, ["full", "eubo", "random"])[1] for name in ("full", "random")]
    assert len({*others, *(colour for _, colour, _ in plots.METHODS.values())}) == len(plots.METHODS) + 2


def test_the_sweep_figure_shows_means_intervals_seeds_and_the_best(
    sweep: Path, drawn: list[Any], tmp_path: Path
) -> None:
    points = sweeps.points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    plots.sweep_figure(points, "accuracy", "beta", tmp_path)
    (axes,) = drawn[0].axes
    means = [list(container.lines[0].get_ydata()) for container in axes.containers]
    assert means[0] == pytest.approx([0.5, 0.85])
    assert means[1] == pytest.approx([0.71, 0.3])
    bars = [segment[:, 1] for segment in axes.containers[0].lines[2][0].get_segments()]
    assert bars[0] == pytest.approx(points[0].interval)
    *dots, star = axes.collections[-5:]
    assert sorted(dots[0].get_offsets()[:, 1]) == pytest.approx([0.4, 0.5, 0.6])
    assert star.get_offsets()[0, 1] == pytest.approx(0.71)
    assert abs(star.get_offsets()[0, 0] - 0.5) < 0.1
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert sorted(labels) == ["EUBO", "Mixture", "best mean on the validation half"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.5", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("beta", "accuracy, test half (fraction)")
    assert "3 seeds" in drawn[0].get_suptitle()


def test_no_two_lines_look_the_same() -> None:
    settings = [{"masking": m, "estimator": e} for m in ("random", "full") for e in plots.METHODS]
    axis = plots.Axis(settings)
    looks = [axis.look(setting) for setting in settings]
    assert len({label for label, _ in looks}) == len({str(drawn) for _, drawn in looks}) == 10
    assert looks[2] == ("EUBO, masking=random", {"color": plots.BLUE, "marker": "o", "linestyle": "-"})
    label, drawn = plots.Axis([{"estimator@positive": "eubo"}]).look({"estimator@positive": "eubo"})
    assert (label, drawn["color"]) == ("estimator@positive=eubo", plots.BLUE)


def test_ticks_that_would_overlap_are_spaced_evenly() -> None:
    axis = plots.Axis([{"num_mc": m} for m in (1, 2, 4, 16, 64)])
    assert [axis.x({"num_mc": m}) for m in (1, 2, 64)] == [0, 1, 4]
    axis = plots.Axis([{"beta": b} for b in (0.5, 0.75, 2)])
    assert [axis.x({"beta": b}) for b in (0.5, 0.75, 2)] == [0.5, 0.75, 2]


def test_dynamics_have_a_panel_a_category(sweep: Path, drawn: list[Any], tmp_path: Path) -> None:
    jobs = sweeps.read_jobs(sweep)
    plots.dynamics_figure(jobs, ["estimator", "beta", "seed"], "s", tmp_path, "reward", 4)
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["EUBO", "Mixture"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.4, 0.6])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["beta=0.5", "beta=2"]
    assert "3 seeds" in figure.get_suptitle()
    assert "last 4 updates" in figure.get_suptitle()


def test_a_page_is_filled_again(tmp_path: Path) -> None:
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "table.md").write_text("| new \\1 |\n")
    path = tmp_path / "README.md"
    path.write_text("Before\n\n<!-- table:beta -->\n| old |\n<!-- /table:beta -->\n\nAfter\n")
    assert figures.page(path) == ["beta"]
    filled = "Before\n\n<!-- table:beta -->\n\n| new \\1 |\n\n<!-- /table:beta -->\n\nAfter\n"
    assert path.read_text() == filled
    figures.page(path)
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
            figures.page(path)
        assert path.read_text() == text
    with pytest.raises(ConfigError, match="is no file"):
        figures.page(tmp_path / "none.md")


def test_jobs_are_shown(sweep: Path) -> None:
    make_job(sweep, "a", {"estimator": "eubo", "beta": 0.5, "seed": 3}, state="failed")
    with console.capture() as capture:
        sweeps.show_jobs(sweep)
    text = capture.get()
    assert "beta: 12 of 13 jobs finished" in text
    assert "a failed: NonFinite: the loss is nan; lower optimizer.lr" in text
    (line,) = [line for line in text.splitlines() if line.split()[1:4] == ["mixture", "0.5", "1"]]
    assert line.split() == ["finished", "mixture", "0.5", "1", "0.900", "0.710", "0.355", "12"]


def test_the_best_is_bold_on_the_terminal(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(force_terminal=True, width=100)
    monkeypatch.setattr(figures, "console", terminal)
    points = sweeps.points(sweeps.read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    with terminal.capture() as capture:
        figures.show(points, sweeps.read_sweep(sweep), "accuracy")
    lines = [line for line in capture.get().splitlines() if "eubo" in line or "mixture" in line]
    assert [line.startswith("\x1b[1m") for line in lines] == [False, False, True, False]


def test_the_command(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "spg.figures", f"sweep={sweep}", "measure=solved", "window=4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "work", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert "0.355" in done.stdout
    assert "runs.csv, sweep.json, table.csv, table.md, solved.png, reward.png, grad_norm.png" in done.stdout
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
