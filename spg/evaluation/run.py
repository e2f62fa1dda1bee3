"""One evaluation, from its settings to results.json.

generations.jsonl grows by one batch at a time, and what it holds is not done again.
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
from spg.evaluation.candidates import Candidate, Candidates, saved_candidates
from spg.evaluation.evaluator import Evaluator
from spg.evaluation.generations import Generations, make_line
from spg.evaluation.metrics import summarize
from spg.evaluation.selection import describe_selection, select
from spg.evaluation.tables import percent, show_results
from spg.models.base_weights import existing
from spg.runs.provenance import git_commit, versions
from spg.runs.status import read_status, write_status
from spg.tasks.base import Task
from spg.tasks.scoring import score_all

log = logging.getLogger(__name__)


def run_evaluation(
    cfg: DictConfig, folder: Path, find_base: Callable[[DictConfig], Path] = existing
) -> dict[str, Any]:
    """Score what generations.jsonl does not hold yet, show the table and write results.json.

    Args:
        cfg: Settings of the evaluation.
        folder: Its directory.
        find_base: Returns the file of base weights for a configuration.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: if lines in the folder were made with another model.
        InputError: if there is nothing to score.
    """
    take_over_logging()
    log.info("Evaluation: %s", folder)
    task: Task = build(cfg.task)
    found = _find_candidates(cfg, task, find_base)
    file = Generations(folder / "generations.jsonl")
    _note_source(found.made_with, folder, bool(file.lines))
    for candidate in found.candidates:
        score_candidate(candidate, file, task, cfg.eval_batch_size)
    results = {candidate.name: summarize(file.of_model(candidate.name)) for candidate in found.candidates}
    record = {
        "task": task.name,
        "split": found.split,
        "shots": found.shots,
        "parser": task.parser,
        "n": max(figures["n"] for figures in results.values()),
        "device": found.device,
        "precision": found.precision,
        "results": results,
        "selection": _selection(cfg, {model: figures["accuracy"] for model, figures in results.items()}),
        "settings": found.settings,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    write_json(folder / "results.json", record)
    show_results(record)
    log.info("Written: %s (results.json, generations.jsonl)", folder)
    return record


def score_candidate(candidate: Candidate, file: Generations, task: Task, batch_size: int) -> None:
    """Complete and measure a candidate's items in batches; append each batch to `file` when it is done."""
    if all(file.has(candidate.name, item) for item in candidate.items):
        return
    candidate.load()
    evaluator = Evaluator(candidate.complete, task, batch_size)
    accuracies = [line["measures"]["accuracy"] for line in file.of_model(candidate.name)]
    with Progress(candidate.name, total=len(candidate.items), completed=len(accuracies)) as progress:
        for results in evaluator.batches(
            candidate.items, wanted=lambda item: not file.has(candidate.name, item)
        ):
            examples = [result.item.example for result in results]
            texts = [result.completion.text for result in results]
            answers = score_all(task.answer, examples, texts, task.workers)
            file.add(
                [
                    make_line(candidate.name, result, answer)
                    for result, answer in zip(results, answers, strict=True)
                ]
            )
            accuracies += [result.measures["accuracy"] for result in results]
            progress.update(len(accuracies), _describe_accuracy(accuracies))


def _find_candidates(cfg: DictConfig, task: Task, find_base: Callable[[DictConfig], Path]) -> Candidates:
    if cfg.generations is not None:
        return saved_candidates(cfg, task)
    examples = task.examples(cfg.split)
    if not examples:  # then no model need be built
        raise InputError(f"{task.name} has no examples of split={cfg.split}; give more rows")
    from spg.evaluation.checkpoints import model_candidates  # torch takes seconds

    return model_candidates(cfg, task, examples, find_base)


def _describe_accuracy(accuracies: Sequence[float]) -> str:
    n = len(accuracies)
    low, high = wilson(round(sum(accuracies)), n)
    return f"accuracy {percent(sum(accuracies) / n)} ± {100 * (high - low) / 2:.1f}"


def _note_source(made_with: dict[str, Any], folder: Path, begun: bool) -> None:
    """Write to the folder's status what its lines are made with.

    Raises:
        ConfigError: if some lines were made with something else.
    """
    before = read_status(folder).get("made_with", made_with) if begun else made_with
    for key in sorted(before.keys() | made_with.keys()):
        if before.get(key) != made_with.get(key):
            raise ConfigError(
                f"{folder} holds completions made with another {key}: {before.get(key)} then, "
                f"{made_with.get(key)} now; start a new evaluation"
            )
    write_status(folder, made_with=made_with)


def _selection(cfg: DictConfig, accuracies: dict[str, float]) -> dict[str, Any] | None:
    """Return the rule, the checkpoint that it chooses and what it chose on; None if there is no run."""
    if cfg.run is None:
        return None
    return {
        "rule": cfg.select,
        "chosen": select(cfg.select, accuracies),
        "chosen_on": describe_selection(cfg.select, cfg.split),
    }
