"""What an evaluation found: figures of its lines, the table, and one table over a multirun's evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from spg.core.console import console
from spg.core.errors import RunError
from spg.core.files import write_json
from spg.core.statistics import bootstrap, mean_pass_at_k, wilson
from spg.evaluation.generations import Line
from spg.evaluation.sources import BASE
from spg.reports.tables import empty_table, value_text
from spg.runs import multirun as sweeps

RESAMPLES = 2000
Figures = dict[str, Any]
# what is scored, by the split's name
SCORED = {"validation": "the validation half", "test": "the test half", "heldout": "both halves"}


def figures(lines: Sequence[Line]) -> Figures:
    """Return a model's figures: accuracy, its 95% interval, n examples, pass@k, lengths, other measures.

    With one sample an example and accuracies of 0 and 1 the interval is Wilson's, else a bootstrap over
    examples, which has no width where all are 0 or all are 1: there too it is Wilson's. effective_length:
    mean completion tokens up to and including the first EOS. None: not known.
    """
    groups: dict[int, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["index"], []).append(line)
    samples = min(map(len, groups.values()))
    measures = {}
    for name in lines[0]["measures"]:
        values = [[line["measures"][name] for line in group] for group in groups.values()]
        measures[name] = _measure(values)
    counts = [(sum(x["measures"]["accuracy"] == 1.0 for x in g), len(g)) for g in groups.values()]
    tokens, decoded, steps, ties = (
        [line[key] for line in lines] for key in ("tokens", "decoded", "steps", "near_ties")
    )
    return {
        "accuracy": measures["accuracy"]["mean"],
        "interval": measures["accuracy"]["interval"],
        "interval_method": measures["accuracy"]["interval_method"],
        "n": len(groups),
        "completions": len(lines),
        "pass@k": {str(k): mean_pass_at_k(counts, k) for k in range(1, samples + 1)} if samples > 1 else None,
        "effective_length": None if None in tokens else sum(tokens) / len(tokens),
        "tokens_per_step": None if None in (*decoded, *steps) else sum(decoded) / max(1, sum(steps)),
        "near_ties": None if None in ties else sum(ties),
        "completions_with_near_ties": None if None in ties else sum(n > 0 for n in ties),
        "measures": measures,
    }


def _measure(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the mean over examples of their samples' means, and its interval."""
    means = np.array([sum(group) / len(group) for group in values])
    one_each = all(len(group) == 1 and group[0] in (0, 1) for group in values)
    counted = one_each or bool((means == 0).all()) or bool((means == 1).all())
    interval = wilson(int(means.sum()), len(means)) if counted else bootstrap(means, RESAMPLES)
    method = "wilson" if counted else "bootstrap over examples"
    return {"mean": float(means.mean()), "interval": list(interval), "interval_method": method}


def chosen(rule: str, accuracies: Mapping[str, float]) -> str | None:
    """Return the checkpoint that a rule marks among {model: accuracy}, None where there is none."""
    if rule == "validation":
        best = "checkpoints/best.ckpt"
        return best if best in accuracies else None
    checkpoints = [model for model in accuracies if model != BASE]
    return max(checkpoints, key=lambda model: accuracies[model], default=None)


def chosen_on(rule: str, split: str) -> str:
    """Return, in words, what a rule chose the marked checkpoint on, where `split` was scored."""
    if rule == "test_average":
        return f"chosen on the scored items themselves, {SCORED[split]}, by the best average, as published"
    words = f"chosen on the validation half, during training; scored on {SCORED[split]}"
    if split == "test":
        return words
    return f"{words}: the items it was chosen on are among those scored, unless the run's were others"


def percent(share: float | None) -> str:
    """Return a share as a percentage, `-` for none."""
    return "-" if share is None else f"{100 * share:.2f}"


def number(value: float | None) -> str:
    """Return a figure for a table, `-` for none."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"


def show(record: Mapping[str, Any]) -> None:
    """Print the tables of what results.json holds, and under them what else two scores must share."""
    results: dict[str, Figures] = record["results"]
    selection = record["selection"] or {}
    headings = ["accuracy\n%", "95%\ninterval", "\nn", "tokens\nto EOS", "tokens\na step", "near\nties"]
    table = empty_table(f"{record['task']}, split {record['split']}", ["model"], headings)
    for model, found in results.items():
        low, high = map(percent, found["interval"])
        cells = [percent(found["accuracy"]), f"{low} to {high}"]
        cells += [number(found[key]) for key in ("n", "effective_length", "tokens_per_step", "near_ties")]
        table.add_row(Text(f"{model} *" if model == selection.get("chosen") else model), *cells)
    console.print(table)
    others = {model: _others(found) for model, found in results.items()}
    names = list(dict.fromkeys(name for shares in others.values() for name in shares))
    if names:
        table = empty_table("beside it, %", ["model"], names)
        for model, shares in others.items():
            table.add_row(Text(model), *(percent(shares.get(name)) for name in names))
        console.print(table)
    for line in (*beside(record), *selection_lines(record["selection"])):
        console.print(line, markup=False, soft_wrap=True)


def _others(found: Figures) -> dict[str, float]:
    """Return what stands beside a model's accuracy: pass@k, and means of its other measures."""
    shares = {f"pass@{k}": share for k, share in (found["pass@k"] or {}).items()}
    means = {name.replace("_", " "): measure["mean"] for name, measure in found["measures"].items()}
    return shares | {name: mean for name, mean in means.items() if name != "accuracy"}


def beside(record: Mapping[str, Any]) -> list[str]:
    """Return, in lines, what must stand beside a score for two scores to be comparable."""
    settings = record["settings"]
    intervals = {found["interval_method"] for found in record["results"].values()}
    score = f"parser {record['parser']}, interval {', '.join(sorted(intervals))}"
    if settings["generations"] is not None:
        return [f"{score}; shots, decoding and model as they were for {settings['generations']}"]
    model = f"model {settings['network']}, weights {settings['weights']}"
    model += f", run {settings['run']}" if settings["run"] else ""
    model += f", adapter {settings['adapter']}" if settings.get("adapter") else ""
    decoding = (
        f"{settings['gen_length']} tokens in {settings['steps']} steps, blocks of {settings['block_size']}, "
        f"{settings['remasking']}, temperature {settings['temperature']:g}"
    )
    if settings.get("cache", "none") != "none":
        every = settings["refresh_every"]
        decoding += f", {settings['cache']} cache" + (f" refreshed every {every} steps" if every else "")
    if settings["temperature"] > 0 or settings["remasking"] == "random":
        decoding += f", {settings['samples']} samples, seed {settings['seed']}"
    return [
        f"{score}, shots {record['shots']}",
        decoding,
        f"{model}; {record['device']}, {record['precision']}",
    ]


def selection_lines(selection: Mapping[str, Any] | None) -> list[str]:
    """Return the line that says how a checkpoint was chosen, if one was."""
    if selection is None or selection["chosen"] is None:
        return []
    return [f"* {selection['chosen_on']} (select={selection['rule']})"]


@dataclass(frozen=True)
class Row:
    """A model's scores in one setting of a multirun: {length: figures}, and their average if all are there.

    who: values of the swept keys that make another model; what: of the others, but the length. rule: by which
    the checkpoints of this setting are chosen, None where there is none, or not one for all lengths.
    """

    who: tuple[str, ...]
    what: tuple[str, ...]
    model: str
    scores: dict[str, Figures]
    average: float | None
    rule: str | None


def report(folder: Path) -> None:
    """Write a multirun's results.json from those of its jobs, and print one table over all of them.

    A checkpoint is chosen by its average over the lengths, in each setting of the other swept keys.
    """
    sweep, jobs = sweeps.read_sweep(folder), sweeps.read_jobs(folder)
    who = [key for key in sweep.swept if key in ("run", "adapter", "generations") or key.startswith("model")]
    what = [key for key in sweep.swept if key not in (*who, "gen_length")]
    records = {job.name: _read(job.folder / "results.json") for job in jobs if job.state == "finished"}
    rows = _rows(jobs, records, who, what)
    marked = _chosen_rows(rows)
    entries = [
        {
            "model": row.model,
            **dict(zip((*who, *what), (*row.who, *row.what), strict=True)),
            "scores": row.scores,
            "average": row.average,
            "chosen": row in marked,
        }
        for row in rows
    ]
    about = {"name": sweep.name, "command": sweep.command, "swept": sweep.swept}
    states = [{"job": job.name, "state": job.state, "error": job.error} for job in jobs]
    words: dict[str, dict[str, None]] = {}  # by rule, one for each split, in order
    for record in records.values():
        if record["selection"]:
            rule = record["selection"]["rule"]
            words.setdefault(rule, {})[chosen_on(rule, record["split"])] = None
    selection = {rule: "; or ".join(words[rule]) for rule in sorted(words)}
    write_json(folder / "results.json", {**about, "selection": selection, "jobs": states, "results": entries})
    ended = sum(job.state == "finished" for job in jobs)
    console.print(f"{sweep.name}: {ended} of {len(jobs)} evaluations finished; accuracy, %", markup=False)
    _show_rows(who, rows, marked)
    for record in list(records.values())[:1]:
        settings = f"parser {record['parser']}, shots {record['shots']}, split {record['split']}"
        console.print(f"first job: {settings}; each job's results.json has its own", soft_wrap=True)
    for rule, how in selection.items():
        console.print(f"* {how} (select={rule})", soft_wrap=True)
    for job in jobs:
        if job.error is not None:
            console.print(f"{job.name} {job.state}: {job.error}", markup=False, soft_wrap=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} can't be read ({error}); remove its folder and run the command again"
        ) from error
    return record


def _rows(
    jobs: Sequence[sweeps.Job],
    records: Mapping[str, Mapping[str, Any]],
    who: Sequence[str],
    what: Sequence[str],
) -> list[Row]:
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[sweeps.Job]] = {}
    for job in jobs:
        key = tuple(tuple(value_text(job.overrides.get(k)) for k in keys) for keys in (who, what))
        groups.setdefault((key[0], key[1]), []).append(job)
    rows = []
    for (whose, setting), group in groups.items():
        done = [job for job in group if job.name in records]
        models = dict.fromkeys(model for job in done for model in records[job.name]["results"])
        rules = {(records[job.name]["selection"] or {}).get("rule") for job in done}
        rule = rules.pop() if len(rules) == 1 else None
        for model in models:
            found = {
                value_text(job.overrides.get("gen_length")): records[job.name]["results"][model]
                for job in done
                if model in records[job.name]["results"]
            }
            scores = {
                length: {key: figure[key] for key in ("accuracy", "interval", "n")}
                for length, figure in found.items()
            }
            average: float | None = sum(score["accuracy"] for score in scores.values()) / len(scores)
            average = average if len(scores) == len(group) else None
            rows.append(Row(whose, setting, model, scores, average, rule))
    return rows


def _chosen_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the row of the checkpoint that its rule chooses in each setting that has all its lengths."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.who, row.what), {})[row.model] = row
    found = []
    for group in groups.values():
        averages = {model: row.average for model, row in group.items() if row.average is not None}
        rule = next(iter(group.values())).rule  # a setting's rows have one
        best = chosen(rule, averages) if rule is not None and len(averages) == len(group) else None
        found += [group[best]] if best is not None else []
    return found


def _show_rows(who: Sequence[str], rows: Sequence[Row], marked: Sequence[Row]) -> None:
    """Print one table with a column a setting and length; where that is too wide, one a setting."""
    table = _table(who, rows, marked)
    if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(table)
        return
    for setting in dict.fromkeys(row.what for row in rows):
        console.print(_table(who, [row for row in rows if row.what == setting], marked))


def _table(who: Sequence[str], rows: Sequence[Row], marked: Sequence[Row]) -> Table:
    columns: list[tuple[tuple[str, ...], str]] = []  # setting, and length or "average"
    for setting in dict.fromkeys(row.what for row in rows):
        lengths = dict.fromkeys(length for row in rows if row.what == setting for length in row.scores)
        ordered = sorted(lengths, key=lambda length: (len(length), length))
        columns += [(setting, length) for length in (*ordered, *(["average"] if len(ordered) > 1 else []))]
    headings = ["\n".join((*setting, "" if length == "null" else length)) for setting, length in columns]
    table = empty_table("", [*who, "model"], headings)
    cells: dict[tuple[tuple[str, ...], str], dict[tuple[tuple[str, ...], str], str]] = {}
    for row in rows:
        line = cells.setdefault((row.who, row.model), {})
        line |= {(row.what, length): percent(score["accuracy"]) for length, score in row.scores.items()}
        if row.average is not None:
            last = "average" if (row.what, "average") in columns else next(iter(row.scores))
            line[row.what, last] = percent(row.average) + ("*" if row in marked else "")
    for (whose, model), line in cells.items():
        table.add_row(*map(Text, (*whose, model)), *(line.get(column, "-") for column in columns))
    return table
