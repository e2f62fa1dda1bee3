"""Evaluation of the test half before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from spg.core.errors import RunError
from spg.evaluation.evaluator import Evaluation
from spg.models.weights import describe_checkpoint
from spg.runs.multirun import MOMENTS
from spg.training.callbacks.validation import Validation
from spg.training.module import Training


class BeforeAndAfter(pl.Callback):
    """Evaluates the test half with the base model, the model after the last update and the best checkpoint.

    Args:
        best: File of the best checkpoint.
        validation: Knows which update is the best.

    Attributes:
        results: Evaluations by their moment, one of MOMENTS.
    """

    def __init__(self, best: Path, validation: Validation) -> None:
        self.best = best
        self.validation = validation
        self.results: dict[str, Evaluation] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the base model, unless the run goes on from a checkpoint."""
        assert isinstance(module, Training)
        if "before" not in self.results:
            self.results["before"] = module.evaluate("test")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the model after the last update and the best checkpoint, if all updates are done."""
        assert isinstance(module, Training)
        if module.updates < module.max_updates:
            return
        self.results["last"] = module.evaluate("test")
        last = module.weights.copies()
        update, chosen = describe_checkpoint(self.best)["spg"]["updates"], self.validation.best
        if chosen is None or chosen[0] != update:
            raise RunError(
                f"{self.best} is of update {update}, but validation chose {chosen}; resume from an earlier "
                "checkpoint of this run: resume=<its file>"
            )
        module.weights.load_file(self.best)
        self.results["after"] = module.evaluate("test")
        module.weights.load(last)

    def summary(self) -> dict[str, Any]:
        """Return the number of examples, and each measure at each of MOMENTS with its 95% interval.

        The method of an interval stands beside it. `after` is the best checkpoint, chosen on the validation
        half.
        """
        figures: dict[str, Any] = {"n": len(self.results["after"].texts)}
        for name in self.results["after"].measures:
            for moment in MOMENTS:
                figures[f"{name}.{moment}"] = self.results[moment].mean(name)
                interval = self.results[moment].interval(name)
                figures[f"{name}.{moment}.interval"] = [interval.low, interval.high]
                figures[f"{name}.{moment}.interval_method"] = interval.method
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return the measures and texts of the base model."""
        if "before" not in self.results:
            return {}
        before = self.results["before"]
        measures = {name: torch.from_numpy(values) for name, values in before.measures.items()}
        return {"measures": measures, "texts": list(before.texts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measures and texts of the base model."""
        measures = {name: values.numpy() for name, values in state_dict["measures"].items()}
        self.results["before"] = Evaluation(measures, tuple(state_dict["texts"]), ())
