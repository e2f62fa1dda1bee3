"""Figures of a model from its measured completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spg.core.statistics import interval_of_mean, mean_pass_at_k
from spg.evaluation.generations import Line

Figures = dict[str, Any]


def summarize(lines: Sequence[Line]) -> Figures:
    """Return a model's figures; None stands for what is not known.

    They are accuracy, its 95% interval and the method of the interval, the number n of examples and of
    completions, pass@k if there are several samples, the mean number of tokens up to and including the first
    EOS (effective_length), decoding steps of a completion, tokens a step, near ties, and mean and interval of
    every measure.

    Args:
        lines: The lines of one model in generations.jsonl.
    """
    groups: dict[int, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["index"], []).append(line)
    samples = min(map(len, groups.values()))
    measures = {}
    for name in lines[0]["measures"]:
        values = [[line["measures"][name] for line in group] for group in groups.values()]
        interval = interval_of_mean(values)
        measures[name] = {
            "mean": interval.mean,
            "interval": [interval.low, interval.high],
            "interval_method": interval.method,
        }
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
        "steps": None if None in steps else sum(steps) / len(steps),
        "tokens_per_step": None if None in (*decoded, *steps) else sum(decoded) / max(1, sum(steps)),
        "near_ties": None if None in ties else sum(ties),
        "completions_with_near_ties": None if None in ties else sum(n > 0 for n in ties),
        "measures": measures,
    }
