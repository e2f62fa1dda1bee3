"""`python -m spg.figures`: table and figures of a multirun, and tables of a page filled again."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spg import config
from spg.cli import launch
from spg.config import ConfigError
from spg.core.console import console, take_over_logging
from spg.core.files import write_text
from spg.runs import multirun as sweeps
from spg.runs.multirun import Point, Sweep

log = logging.getLogger(__name__)

_MARKED = re.compile(r"(<!-- table:(?P<name>[\w.-]+) -->\n).*?(<!-- /table:(?P=name) -->)", re.DOTALL)
_OPENED = re.compile(r"<!-- table:([\w.-]+) -->")


def job(cfg: DictConfig) -> None:
    """Make what is configured; raises ConfigError where neither a sweep nor a page is given."""
    config.check(cfg)
    take_over_logging()
    if cfg.sweep is None and cfg.page is None:
        raise ConfigError(
            "nothing to do: give sweep=<directory of a multirun>, or page=<Markdown page with tables>"
        )
    if cfg.sweep is not None:
        folder = Path(cfg.sweep)
        output = folder / "figures" if cfg.output is None else Path(cfg.output)
        paths = make(folder, output, cfg.measure, cfg.window)
        log.info("Written to %s: %s", output, ", ".join(path.name for path in paths))
    if cfg.page is not None:
        filled = page(Path(cfg.page))
        log.info("%s: tables filled again: %s", cfg.page, ", ".join(filled))


def make(folder: Path, output: Path, measure: str, window: int) -> list[Path]:
    """Write table, figures and the rows they come from to `output`; return the paths.

    Raises ConfigError where the folder is no sweep's, no job has finished, or none has the measure.
    """
    sweep, rows = sweeps.read_sweep(folder), sweeps.read_rows(folder)
    if not any(row["state"] == "finished" for row in rows):
        states = Counter(row["state"] for row in rows)
        counts = ", ".join(f"{n} {state}" for state, n in states.items()) or "no job has begun"
        raise ConfigError(
            f"sweep={folder}: no job has finished ({counts}); run the same command again to go on: "
            f"{sweep.command}"
        )
    if measure not in sweeps.measures(rows):
        known = ", ".join(sweeps.measures(rows))
        raise ConfigError(f"measure={measure} was not measured by these jobs; allowed: {known}")
    points = sweeps.points(rows, sweep.swept, measure)
    note = sweeps.left_out(rows, measure)
    if note:
        log.info("%s", note)
    show(points, sweep, measure)
    output.mkdir(parents=True, exist_ok=True)
    paths = [
        sweeps.write_runs(folder, output),
        write_text(output / "sweep.json", (folder / "sweep.json").read_text(encoding="utf-8")),
        write_text(output / "table.csv", table_csv(points, sweep, measure)),
        write_text(output / "table.md", table_markdown(points, sweep, measure, note)),
    ]
    from spg.reports.plots import dynamics_figure, sweep_figure  # matplotlib takes a second

    paths.append(sweep_figure(points, measure, sweep.name, output / f"{measure}.png"))
    jobs = sweeps.read_jobs(folder)
    for name in ("reward", "grad_norm"):
        drawn = dynamics_figure(jobs, sweep.swept, sweep.name, output / f"{name}.png", name, window)
        paths += [drawn] if drawn else []
    if paths[-1].stem != "grad_norm":
        log.info("Reward and gradient norm need the jobs' own metrics.csv, which %s does not hold.", folder)
    return paths


def headings(sweep: Sweep, measure: str) -> list[str]:
    """Return the headings of the table that a person reads."""
    return [*sweep.keys, "seeds", f"{measure}, test", "95% interval", "sd", "validation"]


def cells(point: Point) -> list[str]:
    """Return a point as text, under `headings`."""
    interval = "-" if point.interval is None else "{:.3f} to {:.3f}".format(*point.interval)
    setting = [sweeps.written(value) for value in point.setting.values()]
    numbers = ["-" if x is None else f"{x:.3f}" for x in (point.sd, point.validation)]
    return [*setting, str(len(point.values)), f"{point.mean:.3f}", interval, *numbers]


def table_markdown(points: Sequence[Point], sweep: Sweep, measure: str, note: str) -> str:
    """Return the table in Markdown, the best setting by validation in bold, and what it shows."""
    chosen = sweeps.best(points)
    lines = [headings(sweep, measure), ["---"] * len(headings(sweep, measure))]
    lines += [[f"**{cell}**" for cell in cells(p)] if p is chosen else cells(p) for p in points]
    words = (
        f"`{sweep.command}`: mean over seeds on the test half, each at the checkpoint that is best on the "
        "validation half; bold: best mean on the validation half. The interval is a percentile bootstrap "
        f"over seeds, too narrow where they are few. {note}"
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{words.strip()}\n"


def table_csv(points: Sequence[Point], sweep: Sweep, measure: str) -> str:
    """Return the table as CSV with all digits, an empty cell for what one seed can't say."""
    columns = [*sweep.keys, "n", "seeds", f"{measure}.mean", "low", "high", "sd", "validation.mean", "best"]
    chosen, rows = sweeps.best(points), []
    for point in points:
        low, high = point.interval or (None, None)
        seeds = " ".join(sweeps.written(seed) for seed in point.seeds)
        values: list[Any] = [*point.setting.values(), len(point.values), seeds, point.mean, low, high]
        values += [point.sd, point.validation, int(point is chosen)]
        rows.append(dict(zip(columns, values, strict=True)))
    return sweeps.csv_text(columns, rows)


def show(points: Sequence[Point], sweep: Sweep, measure: str) -> None:
    """Print the table, the best setting by validation in bold."""
    heads, n = [text.replace(", ", ",\n") for text in headings(sweep, measure)], len(sweep.keys)
    table = sweeps.table_of(f"{sweep.name}: mean over seeds; bold: best by validation", heads[:n], heads[n:])
    chosen = sweeps.best(points)
    for point in points:
        table.add_row(*cells(point), style="bold" if point is chosen else None)
    console.print(table)


def page(path: Path) -> list[str]:
    """Fill each `<!-- table:NAME -->` pair of a page from NAME/table.md beside it; return the names.

    Raises ConfigError, and changes nothing, where page, pair or table is missing.
    """
    if not path.is_file():
        raise ConfigError(f"page={path} is no file; give a Markdown page, as results/README.md")
    text = path.read_text(encoding="utf-8")
    names = [match["name"] for match in _MARKED.finditer(text)]
    if not names or names != _OPENED.findall(text):
        lost = ", ".join(name for name in _OPENED.findall(text) if name not in names)
        raise ConfigError(
            f"page={path}: {f'table:{lost} has no end' if lost else 'no table is marked'}; mark each "
            "by lines of their own, <!-- table:NAME --> and <!-- /table:NAME -->"
        )
    for name in names:
        if not (path.parent / name / "table.md").is_file():
            raise ConfigError(
                f"page={path}: table:{name} has no {path.parent / name / 'table.md'}; make it with "
                f"python -m spg.figures sweep=<its directory> output={path.parent / name}"
            )

    def filled(match: re.Match[str]) -> str:
        table = (path.parent / match["name"] / "table.md").read_text(encoding="utf-8")
        return f"{match[1]}\n{table}\n{match[3]}"

    write_text(path, _MARKED.sub(filled, text))
    return names


def main() -> None:
    """Run the command."""
    launch.run("figures", job)
