"""One evaluation from its configuration to results.json, of models or of saved completions.

generations.jsonl grows by a batch at a time, and what it holds is not done again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spg.config import ConfigError, build
from spg.core.console import take_over_logging
from spg.core.errors import InputError
from spg.core.files import write_json
from spg.core.progress import Progress
from spg.core.statistics import wilson
from spg.evaluation import sources
from spg.evaluation.generations import Generations, Item, Line, Source, Subject, line_of, read_saved
from spg.evaluation.results import chosen, chosen_on, figures, percent, show
from spg.models.base_weights import existing
from spg.runs.provenance import git_commit, versions
from spg.runs.status import read_status, write_status
from spg.tasks.base import Task
from spg.tasks.scoring import score_all

log = logging.getLogger(__name__)


def evaluate(
    cfg: DictConfig, folder: Path, find_base: Callable[[DictConfig], Path] = existing
) -> dict[str, Any]:
    """Complete and score what generations.jsonl does not hold yet, show the table and write results.json.

    find_base: returns the file of base weights for a configuration. Returns what results.json holds.
    Raises ConfigError where the folder's lines were made with another model.
    """
    take_over_logging()
    log.info("Evaluation: %s", folder)
    task: Task = build(cfg.task)
    if cfg.generations is not None:
        source = saved(cfg, task)
    else:
        examples = task.examples(cfg.split)  # where there are none, no model need be built
        if not examples:
            raise InputError(f"{task.name} has no examples of split={cfg.split}; give more rows")
        from spg.evaluation.candidates import models

        source = models(cfg, task, examples, find_base)
    file = Generations(folder / "generations.jsonl")
    _same_source(source.made_with, folder, bool(file.lines))
    for subject in source.subjects:
        work_through(subject, file, task, cfg.eval_batch_size)
    results = {subject.name: figures(file.of(subject.name)) for subject in source.subjects}
    record = {
        "task": task.name,
        "split": source.split,
        "shots": source.shots,
        "parser": task.parser,
        "n": max(found["n"] for found in results.values()),
        "device": source.device,
        "precision": source.precision,
        "results": results,
        "selection": _selection(cfg, {model: found["accuracy"] for model, found in results.items()}),
        "settings": source.settings,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    write_json(folder / "results.json", record)
    show(record)
    log.info("Written: %s (results.json, generations.jsonl)", folder)
    return record


def saved(cfg: DictConfig, task: Task) -> Source:
    """Return the completions of the file `cfg.generations`; raises InputError where it can't be used."""
    path = Path(cfg.generations)

    def as_they_are(batch: Sequence[Item]) -> list[Line]:
        return [item.saved for item in batch]

    settings = dict.fromkeys(sources.DECODING) | {"generations": str(cfg.generations), "run": None}
    return Source(
        [Subject(name, items, as_they_are) for name, items in read_saved(path, task).items()],
        settings | {"eval_batch_size": cfg.eval_batch_size},
        sources.fingerprints(cfg),
    )


def work_through(subject: Subject, file: Generations, task: Task, batch_size: int) -> None:
    """Complete and score a subject's items in batches, each appended to `file` when it is done.

    A batch of which some lines are there already is completed as a whole, since the items beside an item may
    change the last digits; only the missing lines are scored and added.
    """
    batches = [subject.items[at : at + batch_size] for at in range(0, len(subject.items), batch_size)]
    missing = [
        [item for item in batch if (subject.name, item.index, item.sample) not in file.lines]
        for batch in batches
    ]
    left = sum(map(len, missing))
    if not left:
        return
    subject.ready()
    accuracies = [line["measures"]["accuracy"] for line in file.of(subject.name)]
    with Progress(subject.name, total=len(subject.items), completed=len(accuracies)) as progress:
        for batch, wanted in zip(batches, missing, strict=True):
            if not wanted:
                continue
            made = dict(zip(map(id, batch), subject.complete(batch), strict=True))
            examples = [item.example for item in wanted]
            texts = [made[id(item)]["completion"] for item in wanted]
            answers = score_all(task.answer, examples, texts, task.workers)
            measures = score_all(task.measure, examples, texts, task.workers)
            file.add(
                [
                    line_of(subject.name, item, made[id(item)], answer, measured)
                    for item, answer, measured in zip(wanted, answers, measures, strict=True)
                ]
            )
            accuracies += [measured["accuracy"] for measured in measures]
            progress.update(len(accuracies), _accuracy_in_words(accuracies))


def _accuracy_in_words(accuracies: Sequence[float]) -> str:
    n = len(accuracies)
    low, high = wilson(round(sum(accuracies)), n)
    return f"accuracy {percent(sum(accuracies) / n)} ± {100 * (high - low) / 2:.1f}"


def _same_source(made_with: dict[str, Any], folder: Path, begun: bool) -> None:
    """Note what the folder's lines are made with; raises ConfigError where some were made with another."""
    before = read_status(folder).get("made_with", made_with) if begun else made_with
    for key in sorted(before.keys() | made_with.keys()):
        if before.get(key) != made_with.get(key):
            raise ConfigError(
                f"{folder} holds completions made with another {key}: {before.get(key)} then, "
                f"{made_with.get(key)} now; start a new evaluation"
            )
    write_status(folder, made_with=made_with)


def _selection(cfg: DictConfig, accuracies: dict[str, float]) -> dict[str, Any] | None:
    """Return how a run's checkpoint is chosen and which it is, None where there is no run."""
    if cfg.run is None:
        return None
    how = chosen_on(cfg.select, cfg.split)
    return {"rule": cfg.select, "chosen": chosen(cfg.select, accuracies), "chosen_on": how}
