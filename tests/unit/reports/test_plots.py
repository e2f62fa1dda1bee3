"""Figures: what is drawn where, and that every method looks the same in all of them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from spg.cli.figures import report_sweep
from spg.config import CONF_DIR
from spg.reports import dynamics, plots
from spg.reports.axis import Axis
from spg.reports.dynamics import mean_over_seeds, plot_comparison, plot_panels, read_series, rolling
from spg.reports.plots import plot_sweep
from spg.reports.points import points
from spg.reports.styles import BLUE, ESTIMATORS, KNOWN, METHODS, OTHERS, style
from spg.runs.multirun import read_jobs, read_rows
from tests.unit.reports.sweeps import make_job, make_sweep


def test_rolling_window_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    updates = [int(u) for _ in range(3) for u in range(1, 61, 4)] + [7, 30]
    values = [float(v) for v in rng.normal(size=len(updates))]
    values[5] = float("nan")
    at, mean, sd = rolling(updates, values, 10)
    assert at.tolist() == sorted(set(updates))
    pairs = list(zip(updates, values, strict=True))
    for u, m, s in zip(at, mean, sd, strict=True):
        inside = [v for w, v in pairs if u - 10 < w <= u and v == v]
        assert m == pytest.approx(sum(inside) / len(inside))
        assert s == pytest.approx(np.sqrt(sum((v - m) ** 2 for v in inside) / len(inside)), abs=1e-12)


def test_the_band_is_the_spread_of_the_seeds() -> None:
    """The seeds' rolling means over 2 updates, and not the values, give line and band."""
    runs = [([1, 2, 3], [0.0, 1.0, 2.0]), ([1, 2, 3], [2.0, 3.0, 4.0]), ([2], [float("nan")])]
    at, mean, sd = mean_over_seeds(runs, 2)
    assert at.tolist() == [1, 2, 3]
    np.testing.assert_allclose(mean, [1.0, 1.5, 2.5])
    np.testing.assert_allclose(sd, np.sqrt(2.0))  # of 0 and 2, 0.5 and 2.5, 1.5 and 3.5, with n - 1
    at, mean, sd = mean_over_seeds([([1, 3], [1.0, 2.0]), ([2], [5.0])], 1)
    np.testing.assert_allclose(mean, [1.0, 3.0, 3.5])
    np.testing.assert_allclose(sd[0], 0.0)


def test_missing_rewards_are_no_zeros(sweep: Path) -> None:
    """Rewards 0.1, 0.3, 0.5, 0.7 stand in rows 1, 3, 5, 7 of 8; a window of 4 updates holds two."""
    make_job(sweep, "a", {"estimator": "eubo", "beta": 0.5, "seed": 8}, state="failed")
    jobs = read_jobs(sweep)
    series = read_series(jobs, ["estimator", "beta", "seed"], "reward")
    assert (series[0].setting, len(series[0].runs)) == ({"estimator": "eubo", "beta": 0.5}, 3)
    at, mean, _ = mean_over_seeds(series[0].runs, 4)
    assert at.tolist() == [1, 3, 5, 7]
    np.testing.assert_allclose(mean, [0.1, 0.2, 0.4, 0.6])
    at, mean, sd = mean_over_seeds(read_series(jobs, ["estimator", "beta"], "grad_norm")[0].runs, 4)
    assert at.tolist() == list(range(1, 9))
    np.testing.assert_allclose(mean, 2.0)  # over seeds: 1, 2, 3
    np.testing.assert_allclose(sd, 1.0)
    assert read_series(jobs, ["beta"], "no/such") == []


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lines": [{"estimator": e, "beta": b} for e in ("eubo", "mixture") for b in (0.5, 0.75, 1, 1.5, 2)],
    "one line": [{"omega": w} for w in (0, 0.25, 0.5, 0.75, 1)],
    "bars": [{"estimator": e} for e in ("zero", "elbo", "eubo", "mixture")],
    "methods": [{"algorithm": m} for m in METHODS],
    "two keys": [{"estimator": e, "masking": m} for e in ESTIMATORS for m in ("random", "full")],
    "two numbers": [{"beta": b, "omega": w} for b in (1, 1.5) for w in (0, 0.5, 1)],
    "seeds only": [{}],
    "null": [{"size": None}, {"size": 4}],
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.long] if c in ("one line", "two keys", "null") else [])
        for c in SETTINGS
    ],
)
def test_figures_are_drawn(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 40)  # faster
    keys = list(SETTINGS[case][0])
    folder = make_sweep(tmp_path / "s", [*keys, "seed"])
    for i, setting in enumerate(SETTINGS[case]):
        for seed in range(2):
            summary = {"accuracy.after": 0.1 * seed + 0.01 * i, "validation.best": 0.5}
            make_job(folder, f"{i}-{seed}", setting | {"seed": seed}, **summary)
    paths = report_sweep(folder, folder / "figures", "accuracy", 4)
    names = ["accuracy", "reward", "reward_panels", "grad_norm", "grad_norm_panels"]
    if case == "seeds only":
        names = ["accuracy", "reward", "grad_norm"]
    assert [path.name for path in paths[4:]] == [f"{name}.png" for name in names]
    for path in paths[4:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 2_000
    assert not matplotlib.pyplot.get_fignums(), "figures stay open"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the figures instead of writing them."""
    kept: list[Any] = []
    for module in (plots, dynamics):
        monkeypatch.setattr(module, "save", lambda figure, path: kept.append(figure) or path)
    yield kept
    matplotlib.pyplot.close("all")


def color(artist: Any) -> str:
    return matplotlib.colors.to_hex(artist.get_color()).upper()


def test_every_shipped_method_has_a_style_that_no_other_has() -> None:
    assert sorted(METHODS) == sorted(path.stem for path in (CONF_DIR / "algorithm").glob("*.yaml"))
    for a, b in combinations(METHODS.values(), 2):
        for what in ("label", "colour", "marker", "dash"):
            assert getattr(a, what) != getattr(b, what), (a, b)
    for a, b in combinations(ESTIMATORS.values(), 2):
        assert a.colour != b.colour
        assert a.marker != b.marker
    assert len({(look.colour, look.marker) for look in KNOWN.values()}) == len(METHODS) + 3


# how dichromats see linear RGB (Machado, Oliveira and Fernandes 2009, severity 1)
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopes": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopes": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """Return a colour in CIELAB, as it is seen."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(seen @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("reader", SEEN_BY)
def test_colours_of_methods_are_told_apart_by_all_readers(reader: str) -> None:
    seen = [lab(look.colour, SEEN_BY[reader]) for look in METHODS.values()]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15
    white = lab("white", SEEN_BY[reader])
    assert min(np.linalg.norm(white - colour) for colour in seen) > 25, "faint on paper"


def test_unknown_methods_have_further_styles() -> None:
    names = [f"mine_{i}" for i in range(12)]
    looks = [style(name, names) for name in names]
    assert looks == [style(name, [*reversed(names), "spg"]) for name in names], "whatever the order"
    assert len({(look.colour, look.marker) for look in looks}) == len(names)
    assert not {look.colour for look in looks} & {look.colour for look in METHODS.values()}
    assert not {look.marker for look in looks} & {look.marker for look in METHODS.values()}
    assert style("mine_0") == style("mine_0", ["spg", "d1"]), "the same in every figure"
    many = [f"m{i}" for i in range(OTHERS + 2)]
    assert len({style(name, many).label for name in many}) == len(many)


def test_methods_look_the_same_in_all_figures(drawn: list[Any], tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", ["algorithm", "optimizer.lr", "seed"])
    for method in METHODS:
        for lr in (1, 2):
            overrides = {"algorithm": method, "optimizer.lr": lr, "seed": 0}
            make_job(folder, f"{method}-{lr}", overrides, **{"accuracy.after": 0.5, "validation.best": 0.5})
    jobs, rows = read_jobs(folder), read_rows(folder)
    plot_sweep(points(rows, ["algorithm", "optimizer.lr"], "accuracy"), "accuracy", "s", tmp_path)
    plot_sweep(points(rows, ["algorithm"], "accuracy"), "accuracy", "s", tmp_path)
    series = read_series(jobs, ["algorithm"], "reward")
    plot_comparison(series, "s", tmp_path, "reward", 4)
    plot_panels(series, "s", tmp_path, "reward", 4)
    lines, bars, comparison, panels = drawn
    expected = [(METHODS[name].colour, METHODS[name].marker) for name in sorted(METHODS)]
    for found in (
        [container.lines[0] for container in lines.axes[0].containers],
        [line for line in bars.axes[0].lines if line.get_marker() != "_" and len(line.get_xdata()) == 1],
        comparison.axes[0].lines,
        [axes.lines[0] for axes in panels.axes if axes.get_visible()],
    ):
        assert [(color(line), line.get_marker()) for line in found] == expected
    faces = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in bars.axes[0].patches]
    assert faces == [colour for colour, _ in expected]
    styles = {str(line._dash_pattern) for line in comparison.axes[0].lines}
    assert len(styles) == len(METHODS), "dashes differ, too"


def test_methods_share_a_panel_with_the_legend_beside_it(drawn: list[Any], tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", ["algorithm", "seed"])
    for method in METHODS:
        for seed in (0, 1):
            make_job(folder, f"{method}-{seed}", {"algorithm": method, "seed": seed})
    series = read_series(read_jobs(folder), ["algorithm", "seed"], "grad_norm")
    plot_comparison(series, "s", tmp_path, "grad_norm", 4)
    (figure,) = drawn
    (axes,) = figure.axes
    assert len(axes.lines) == len(axes.collections) == len(METHODS)
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1.5] * 8)  # seeds have 1 and 2
    low, high = (f(axes.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert (low, high) == pytest.approx((1.5 - np.sqrt(0.5), 1.5 + np.sqrt(0.5)))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [METHODS[m].label for m in sorted(METHODS)]
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1, "it covers the lines"
    assert "over seeds" in figure.get_suptitle()
    plot_panels(series, "s", tmp_path, "grad_norm", 4)
    panels = [axes for axes in drawn[1].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [METHODS[m].label for m in sorted(METHODS)]
    assert [len(axes.lines) for axes in panels] == [1] * len(METHODS)


def test_the_sweep_figure_shows_means_intervals_seeds_and_the_best(
    sweep: Path, drawn: list[Any], tmp_path: Path
) -> None:
    averages = points(read_rows(sweep), ["estimator", "beta", "seed"], "accuracy")
    plot_sweep(averages, "accuracy", "beta", tmp_path)
    (axes,) = drawn[0].axes
    means = [list(container.lines[0].get_ydata()) for container in axes.containers]
    assert means[0] == pytest.approx([0.5, 0.85])
    assert means[1] == pytest.approx([0.71, 0.3])
    bars = [segment[:, 1] for segment in axes.containers[0].lines[2][0].get_segments()]
    assert bars[0] == pytest.approx(averages[0].interval)
    *dots, star = axes.collections[-5:]
    assert sorted(dots[0].get_offsets()[:, 1]) == pytest.approx([0.4, 0.5, 0.6])
    assert star.get_offsets()[0, 1] == pytest.approx(0.71)
    assert abs(star.get_offsets()[0, 0] - 0.5) < 0.1
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert sorted(labels) == ["EUBO", "Mixture", "best mean on the\nvalidation half"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.5", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("beta", "accuracy, test half (fraction)")
    assert "3 seeds" in drawn[0].get_suptitle()


def test_no_two_lines_look_the_same() -> None:
    settings = [{"masking": m, "estimator": e} for m in ("random", "full") for e in ESTIMATORS]
    axis = Axis(settings)
    assert len({axis.label(setting) for setting in settings}) == 10
    assert len({str(axis.line(setting)) for setting in settings}) == 10
    assert axis.label(settings[2]) == "EUBO, masking=random"
    assert axis.line(settings[2]) == {"color": BLUE, "marker": "o", "linestyle": "-"}
    setting = {"estimator@positive": "eubo"}
    assert Axis([setting]).label(setting) == "estimator@positive=eubo"
    assert Axis([setting]).line(setting)["color"] == BLUE
    mixed = Axis([{"estimator": "elbo", "algorithm": "d1"}])
    assert mixed.others == ["algorithm", "estimator"], "the method gives the colour"


def test_ticks_that_would_overlap_are_spaced_evenly() -> None:
    axis = Axis([{"num_mc": m} for m in (1, 2, 4, 16, 64)])
    assert [axis.x({"num_mc": m}) for m in (1, 2, 64)] == [0, 1, 4]
    axis = Axis([{"beta": b} for b in (0.5, 0.75, 2)])
    assert [axis.x({"beta": b}) for b in (0.5, 0.75, 2)] == [0.5, 0.75, 2]


def test_a_numeric_key_shades_the_lines_of_a_panel(sweep: Path, drawn: list[Any], tmp_path: Path) -> None:
    series = read_series(read_jobs(sweep), ["estimator", "beta", "seed"], "reward")
    plot_comparison(series, "s", tmp_path, "reward", 4)
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["EUBO", "Mixture"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.4, 0.6])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["beta=0.5", "beta=2"]
    assert "3 seeds" in figure.get_suptitle()
    assert "last 4 updates" in figure.get_suptitle()
    plot_panels(series, "s", tmp_path, "reward", 4)
    titles = [axes.get_title() for axes in drawn[1].axes]
    assert titles == ["EUBO\nbeta=0.5", "EUBO\nbeta=2", "Mixture\nbeta=0.5", "Mixture\nbeta=2"]
