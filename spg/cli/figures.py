"""`python -m spg.figures`: table and figures of a multirun, and the tables of a page filled again."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from spg import config
from spg.cli import launch
from spg.config import ConfigError
from spg.core.console import take_over_logging
from spg.core.files import write_text
from spg.reports.pages import fill_page
from spg.reports.points import describe_missing, measures, points
from spg.reports.tables import show_points, table_csv, table_markdown
from spg.runs.multirun import read_jobs, read_rows, read_sweep, write_runs

log = logging.getLogger(__name__)

# columns of metrics.csv whose dynamics are drawn
DYNAMICS = ("reward", "grad_norm")


def job(cfg: DictConfig) -> None:
    """Make what is configured.

    Raises:
        ConfigError: if neither a sweep nor a page is given.
    """
    config.check(cfg)
    take_over_logging()
    if cfg.sweep is None and cfg.page is None:
        raise ConfigError(
            "nothing to do: give sweep=<directory of a multirun>, or page=<Markdown page with tables>"
        )
    if cfg.sweep is not None:
        folder = Path(cfg.sweep)
        output = folder / "figures" if cfg.output is None else Path(cfg.output)
        paths = report_sweep(folder, output, cfg.measure, cfg.window)
        log.info("Written to %s: %s", output, ", ".join(path.name for path in paths))
    if cfg.page is not None:
        names = fill_page(Path(cfg.page))
        log.info("%s: tables filled again: %s", cfg.page, ", ".join(names))


def report_sweep(folder: Path, output: Path, measure: str, window: int) -> list[Path]:
    """Write the table and the figures of a sweep, and the rows behind them.

    Args:
        folder: The sweep's directory.
        output: Directory for the files; it is made if it does not exist.
        measure: Name of the measure that table and figure show.
        window: Number of updates in rolling means.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: if the folder holds no sweep, no job has finished, or none has the measure.
    """
    sweep, rows = read_sweep(folder), read_rows(folder)
    if not any(row["state"] == "finished" for row in rows):
        states = Counter(row["state"] for row in rows)
        counts = ", ".join(f"{n} {state}" for state, n in states.items()) or "no job has begun"
        raise ConfigError(
            f"sweep={folder}: no job has finished ({counts}); run the same command again to go on: "
            f"{sweep.command}"
        )
    if measure not in measures(rows):
        known = ", ".join(measures(rows))
        raise ConfigError(f"measure={measure} was not measured by these jobs; allowed: {known}")
    averages = points(rows, sweep.swept, measure)
    note = describe_missing(rows, measure)
    if note:
        log.info("%s", note)
    show_points(averages, sweep, measure)
    output.mkdir(parents=True, exist_ok=True)
    paths = [
        write_runs(folder, output),
        write_text(output / "sweep.json", (folder / "sweep.json").read_text(encoding="utf-8")),
        write_text(output / "table.csv", table_csv(averages, sweep, measure)),
        write_text(output / "table.md", table_markdown(averages, sweep, measure, note)),
    ]
    from spg.reports.dynamics import plot_comparison, plot_panels, read_series  # matplotlib takes a second
    from spg.reports.plots import plot_sweep

    paths.append(plot_sweep(averages, measure, sweep.name, output / f"{measure}.png"))
    jobs = read_jobs(folder)
    drawn = False
    for name in DYNAMICS:
        series = read_series(jobs, sweep.swept, name)
        if series:
            drawn = True
            paths.append(plot_comparison(series, sweep.name, output / f"{name}.png", name, window))
        if len(series) > 1:
            paths.append(plot_panels(series, sweep.name, output / f"{name}_panels.png", name, window))
    if not drawn:
        log.info("Reward and gradient norm need the jobs' own metrics.csv, which %s does not hold.", folder)
    return paths


def main() -> None:
    """Run the command."""
    launch.run("figures", job)
