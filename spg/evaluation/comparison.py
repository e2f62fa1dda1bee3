"""All evaluations of a multirun: one results.json and one table over its jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from spg.core.console import console
from spg.core.errors import RunError
from spg.core.files import write_json
from spg.evaluation.metrics import Figures
from spg.evaluation.selection import describe_selection, select
from spg.evaluation.tables import percent
from spg.reports.tables import empty_table, value_text
from spg.runs.multirun import Job, read_jobs, read_sweep

# swept keys that make another model; so does every key of the group `model`
MODEL_KEYS = ("run", "adapter", "generations")
Records = Mapping[str, Mapping[str, Any]]
# figures of a model's scores; older results.json have no steps
SCORES = ("accuracy", "interval", "n", "steps", "tokens_per_step")


@dataclass(frozen=True)
class Row:
    """A model's scores in one setting of a multirun.

    Attributes:
        model_keys: Values of the swept keys that make another model.
        setting: Values of the other swept keys, without the length.
        model: Name of the model.
        scores: Figures by length.
        average: Mean accuracy over the lengths; None if one is missing.
        rule: The rule by which checkpoints of this setting are chosen; None if there is none, or if the
            lengths have different ones.
    """

    model_keys: tuple[str, ...]
    setting: tuple[str, ...]
    model: str
    scores: dict[str, Figures]
    average: float | None
    rule: str | None


def report_multirun(folder: Path) -> None:
    """Write a multirun's results.json from those of its jobs, and print one table over all of them.

    A checkpoint is chosen by its average over the lengths, in each setting of the other swept keys.
    """
    sweep, jobs = read_sweep(folder), read_jobs(folder)
    model_keys = [key for key in sweep.swept if key in MODEL_KEYS or key.startswith("model")]
    setting_keys = [key for key in sweep.swept if key not in (*model_keys, "gen_length")]
    records = {job.name: _read(job.folder / "results.json") for job in jobs if job.state == "finished"}
    rows = _rows(jobs, records, model_keys, setting_keys)
    marked = _chosen_rows(rows)
    entries = [
        {
            "model": row.model,
            **dict(zip((*model_keys, *setting_keys), (*row.model_keys, *row.setting), strict=True)),
            "scores": row.scores,
            "average": row.average,
            "chosen": row in marked,
        }
        for row in rows
    ]
    about = {"name": sweep.name, "command": sweep.command, "swept": sweep.swept}
    states = [{"job": job.name, "state": job.state, "error": job.error} for job in jobs]
    selection = _describe_selections(records)
    write_json(folder / "results.json", {**about, "selection": selection, "jobs": states, "results": entries})
    ended = sum(job.state == "finished" for job in jobs)
    paced = any(key.partition(".")[0] == "decoding" for key in setting_keys)
    columns = "accuracy, % (tokens a step)" if paced else "accuracy, %"
    console.print(f"{sweep.name}: {ended} of {len(jobs)} evaluations finished; {columns}", markup=False)
    _show_rows(model_keys, rows, marked, paced)
    for record in list(records.values())[:1]:
        settings = f"parser {record['parser']}, shots {record['shots']}, split {record['split']}"
        console.print(f"first job: {settings}; each job's results.json has its own", soft_wrap=True)
    for rule, words in selection.items():
        console.print(f"* {words} (select={rule})", soft_wrap=True)
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


def _describe_selections(records: Records) -> dict[str, str]:
    """Return in words what each rule chose on; the words differ by split."""
    words: dict[str, dict[str, None]] = {}
    for record in records.values():
        if record["selection"]:
            rule = record["selection"]["rule"]
            words.setdefault(rule, {})[describe_selection(rule, record["split"])] = None
    return {rule: "; or ".join(words[rule]) for rule in sorted(words)}


def _rows(
    jobs: Sequence[Job], records: Records, model_keys: Sequence[str], setting_keys: Sequence[str]
) -> list[Row]:
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Job]] = {}
    for job in jobs:
        key = tuple(
            tuple(value_text(job.overrides.get(k)) for k in keys) for keys in (model_keys, setting_keys)
        )
        groups.setdefault((key[0], key[1]), []).append(job)
    rows = []
    for (values, setting), group in groups.items():
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
                length: {key: figure[key] for key in SCORES if key in figure}
                for length, figure in found.items()
            }
            average: float | None = sum(score["accuracy"] for score in scores.values()) / len(scores)
            average = average if len(scores) == len(group) else None
            rows.append(Row(values, setting, model, scores, average, rule))
    return rows


def _chosen_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the row of the checkpoint that its rule chooses in each setting that has all its lengths."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.model_keys, row.setting), {})[row.model] = row
    found = []
    for group in groups.values():
        averages = {model: row.average for model, row in group.items() if row.average is not None}
        rule = next(iter(group.values())).rule  # the rows of a setting have the same
        best = select(rule, averages) if rule is not None and len(averages) == len(group) else None
        found += [group[best]] if best is not None else []
    return found


def _show_rows(model_keys: Sequence[str], rows: Sequence[Row], marked: Sequence[Row], paced: bool) -> None:
    """Print one table with a column a setting and length; if that is too wide, one table a setting.

    With `paced` the table has tokens a step beside accuracies.
    """
    table = _table(model_keys, rows, marked, paced)
    if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(table)
        return
    for setting in dict.fromkeys(row.setting for row in rows):
        console.print(_table(model_keys, [row for row in rows if row.setting == setting], marked, paced))


def _cell(score: Figures, paced: bool, mark: str) -> str:
    pace = score.get("tokens_per_step") if paced else None
    return percent(score["accuracy"]) + mark + ("" if pace is None else f" ({pace:.1f})")


def _table(model_keys: Sequence[str], rows: Sequence[Row], marked: Sequence[Row], paced: bool) -> Table:
    columns: list[tuple[tuple[str, ...], str]] = []  # setting, and length or "average"
    for setting in dict.fromkeys(row.setting for row in rows):
        lengths = dict.fromkeys(length for row in rows if row.setting == setting for length in row.scores)
        ordered = sorted(lengths, key=lambda length: (len(length), length))
        columns += [(setting, length) for length in (*ordered, *(["average"] if len(ordered) > 1 else []))]
    headings = ["\n".join((*setting, "" if length == "null" else length)) for setting, length in columns]
    table = empty_table("", [*model_keys, "model"], headings)
    cells: dict[tuple[tuple[str, ...], str], dict[tuple[tuple[str, ...], str], str]] = {}
    for row in rows:
        line = cells.setdefault((row.model_keys, row.model), {})
        several = (row.setting, "average") in columns
        mark = "*" if row in marked else ""
        for length, score in row.scores.items():
            line[row.setting, length] = _cell(score, paced, "" if several else mark)
        if several and row.average is not None:
            line[row.setting, "average"] = percent(row.average) + mark
    for (values, model), line in cells.items():
        table.add_row(*map(Text, (*values, model)), *(line.get(column, "-") for column in columns))
    return table
