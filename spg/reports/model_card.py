"""Model cards: what weights are, how they were made, what they reach and how to load them."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData
from omegaconf import DictConfig

from spg import __version__
from spg.config import shipped_option
from spg.core.commands import command_line
from spg.runs.provenance import git_commit
from spg.runs.status import read_status

# the moment of a run's summary.json at which the weights in a file were measured
MEASURED_AT = {"best.ckpt": "after", "last.ckpt": "last", "weights.safetensors": "last", "adapter": "last"}


@dataclass(frozen=True)
class TrainedCard:
    """The model card of an exported run.

    Attributes:
        run: The run's directory.
        trained: The run's configuration.
        base: Name of the base weights; None if they were random.
        source: The file or folder that the weights come from.
        output: The folder that the card is written to.
        whole: Whether the folder holds a whole model; if not, it holds an adapter alone.
        cast: `keep`, or the type that the weights are written in.
    """

    run: Path
    trained: DictConfig
    base: str | None
    source: Path
    output: Path
    whole: bool
    cast: str

    def text(self) -> str:
        """Return the card in Markdown, with the metadata that the hub reads."""
        run, file = self.run.resolve(), self.source.resolve()
        where = file.relative_to(run) if file.is_relative_to(run) else self.source
        base = "random weights" if self.base is None else f"`{self.base}`"
        as_what = "as trained" if self.cast == "keep" else f"written as {self.cast}"
        arguments = read_status(self.run).get("arguments")
        facts = [
            f"- Base model: {base}",
            f"- Trained by: `{_command('train', arguments)}`" if arguments else None,
            f"- Made by: `{_command('export', sys.argv[1:])}`",
            f"- Weights: `{where}`, {as_what}",
            "- All settings of the run: `training.yaml`; "
            f"spg {__version__}, commit {git_commit() or 'unknown'}",
            "- Licence: that of the base model holds for what was trained from it",
        ]
        task = self.trained.task._target_.rpartition(".")[2]
        return f"""---
{self._metadata().to_yaml()}
---

# {run.name}

A masked diffusion language model, trained by reinforcement learning (SPG) on {task}: {self._training()}.

{_lines(facts)}

{measured(self.run, self.source)}

To evaluate it, with `task=...`:

```
{_lines(self.loading_commands())}
```
"""

    def loading_commands(self) -> list[str]:
        """Return commands that load the folder, to be used with a task."""
        model = self.trained.model
        option = shipped_option("model", model)
        choice = ["model=..." if option is None else f"model={option[0]}"]
        path = model.get("path")
        if not self.whole:
            if path is not None and option and option[1].path != path:
                choice.append(f"model.path={path}")
            return [command_line("evaluate", *choice, f"adapter={self.output}")]
        key = "weights" if path is None else "path"
        return [command_line("evaluate", *choice, f"model.{key}={self.output}")]

    def _metadata(self) -> ModelCardData:
        # folders are absolute, even if they do not exist any more; other paths are hub ids
        on_hub = self.base is not None and self.trained.model.weights == "published"
        on_hub = on_hub and not Path(str(self.base)).is_absolute()
        return ModelCardData(
            tags=["masked-diffusion", "reinforcement-learning"],
            base_model=self.base if on_hub else None,
            library_name=None if self.whole else "peft",
        )

    def _training(self) -> str:
        """Return in words which weights were trained."""
        lora = self.trained.model.lora
        words = "all weights trained"
        if lora is not None:
            numbers = f"a low-rank adapter (rank {lora.r}, alpha {lora.alpha:g}, {lora.targets} matrices)"
            words = numbers + (", merged into the weights" if self.whole else ", here without the base")
        if self.whole and self.trained.model.get("quantization") is not None:
            words += "; it was trained on a 4-bit base, and merged into the base as published"
        return words


def measured(run: Path, source: Path) -> str:
    """Return in Markdown what a run measured before training and with the weights `source`."""
    moment = MEASURED_AT.get(source.name) if source.resolve().is_relative_to(run.resolve()) else None
    path = run / "summary.json"
    if moment is None or not path.is_file() or read_status(run).get("state") != "finished":
        return "No figures: the run is not finished, or these are neither its best weights nor its last."
    summary = json.loads(path.read_text(encoding="utf-8"))
    names = [key.removesuffix(".before.interval") for key in summary if key.endswith(".before.interval")]

    def cell(key: str) -> str:
        low, high = summary[f"{key}.interval"]
        return f"{summary[key]:.3f} ({low:.3f} to {high:.3f})"

    rows = [
        f"| {name.replace('_', ' ')} | {cell(f'{name}.before')} | {cell(f'{name}.{moment}')} |"
        for name in names
    ]
    # runs before version 0.6 have bootstrap intervals, and do not name the method
    methods = {summary.get(f"{name}.{moment}.interval_method", "bootstrap") for name in names}
    words = f"with 95% intervals ({', '.join(sorted(methods))}):"
    heading = f"Greedy decoding of the test half, n = {summary['n']}, {words}"
    return _lines([heading, "", "| measure | before | after |", "| --- | --- | --- |", *rows])


def _command(name: str, arguments: list[str]) -> str:
    return shlex.join(["python", "-m", f"spg.{name}", *arguments])


def _lines(lines: list[str] | list[str | None]) -> str:
    return "\n".join(line for line in lines if line is not None)
