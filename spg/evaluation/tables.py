"""Tables of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from spg.core.console import console
from spg.evaluation.metrics import Figures
from spg.reports.tables import empty_table


def percent(share: float | None) -> str:
    """Return a share as a percentage, `-` for none."""
    return "-" if share is None else f"{100 * share:.2f}"


def number(value: float | None) -> str:
    """Return a figure for a table, `-` for none."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"


def show_results(record: Mapping[str, Any]) -> None:
    """Print the tables of a results.json, and under them what two scores must share to be comparable."""
    results: dict[str, Figures] = record["results"]
    selection = record["selection"] or {}
    headings = [
        "accuracy\n%",
        "95%\ninterval",
        "\nn",
        "tokens\nto EOS",
        "\nsteps",
        "tokens\na step",
        "near\nties",
    ]
    table = empty_table(f"{record['task']}, split {record['split']}", ["model"], headings)
    for model, found in results.items():
        low, high = map(percent, found["interval"])
        cells = [percent(found["accuracy"]), f"{low} to {high}"]
        keys = ("n", "effective_length", "steps", "tokens_per_step", "near_ties")
        cells += [number(found.get(key)) for key in keys]  # until 0.5 there were no steps
        table.add_row(Text(f"{model} *" if model == selection.get("chosen") else model), *cells)
    console.print(table)
    others = {model: _others(found) for model, found in results.items()}
    names = list(dict.fromkeys(name for shares in others.values() for name in shares))
    if names:
        table = empty_table("other measures, %", ["model"], names)
        for model, shares in others.items():
            table.add_row(Text(model), *(percent(shares.get(name)) for name in names))
        console.print(table)
    for line in (*score_context(record), *selection_note(record["selection"])):
        console.print(line, markup=False, soft_wrap=True)


def _others(found: Figures) -> dict[str, float]:
    """Return pass@k and the means of all measures but accuracy."""
    shares = {f"pass@{k}": share for k, share in (found["pass@k"] or {}).items()}
    means = {name.replace("_", " "): measure["mean"] for name, measure in found["measures"].items()}
    return shares | {name: mean for name, mean in means.items() if name != "accuracy"}


def score_context(record: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what two scores must share to be comparable."""
    settings = record["settings"]
    intervals = {found["interval_method"] for found in record["results"].values()}
    score = f"parser {record['parser']}, interval {', '.join(sorted(intervals))}"
    if settings["generations"] is not None:
        return [f"{score}; shots, decoding and model as they were for {settings['generations']}"]
    model = f"model {settings['network']}, weights {settings['weights']}"
    model += f", run {settings['run']}" if settings["run"] else ""
    model += f", adapter {settings['adapter']}" if settings.get("adapter") else ""
    decoding = (
        f"{settings['gen_length']} tokens {_pace(settings)}, blocks of {settings['block_size']}, "
        f"{settings['remasking']}, temperature {settings['temperature']:g}"
    )
    if settings.get("cache", "none") != "none":
        every = settings["refresh_every"]
        decoding += f", {settings['cache']} cache" + (f" refreshed every {every} steps" if every else "")
    if settings.get("cfg_scale"):
        decoding += f", guidance {settings['cfg_scale']:g}"
    if settings["temperature"] > 0 or settings["remasking"] == "random":
        decoding += f", {settings['samples']} samples, seed {settings['seed']}"
    return [
        f"{score}, shots {record['shots']}",
        decoding,
        f"{model}; {record['device']}, {record['precision']}",
    ]


def _pace(settings: Mapping[str, Any]) -> str:
    """Return in words what decides how many tokens a step commits."""
    for rule in ("threshold", "factor"):  # until 0.5 there were neither
        if settings.get(rule) is not None:
            return f"by {rule} {settings[rule]:g}"
    return f"in {settings['steps']} steps"


def selection_note(selection: Mapping[str, Any] | None) -> list[str]:
    """Return the line that says how a checkpoint was chosen, if one was."""
    if selection is None or selection["chosen"] is None:
        return []
    return [f"* {selection['chosen_on']} (select={selection['rule']})"]
