"""What stands in while a run is planned: a tokenizer of bare numbers, and a task that rewards at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from spg.config import build
from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.models.policy import Policy
from spg.tasks.base import BaseTask, Task

# Tokens of a prompt that are taken if nothing can be measured: a high value of the instruct prompts of each
# task, and for Sudoku the three worked examples of the paper (up to 1500 tokens with some tokenizers).
TYPICAL = {"GSM8K": 200, "Math500": 250, "Countdown": 200, "Sudoku": 1000, "HumanEval": 400, "MBPP": 400}
OTHERWISE = 256
# rows of each half of the held-out data of tasks whose data come from the hub
HELD_OUT = {"GSM8K": 660, "Math500": 250, "HumanEval": 82, "MBPP": 250}
# prompts of which the longest counts
SAMPLE = 64


class Numbers:
    """A tokenizer of bare numbers, for networks without text; the last three are mask, EOS and padding.

    Args:
        size: Number of tokens.
    """

    unk_token_id = None
    chat_template = None

    def __init__(self, size: int) -> None:
        self.size = size
        self.mask_token_id, self.eos_token_id, self.pad_token_id = size - 3, size - 2, size - 1

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Read numbers, for all of which there are tokens."""
        return [int(word) % (self.size - 3) for word in text.split()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Write the numbers."""
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Prompting:
    """The prompts that a plan takes.

    Attributes:
        task: Asks them; its rewards differ within every group.
        tokenizer: Reads them.
        tokens: Tokens of the longest prompt.
        held_out: Examples in each held-out half; None if that is not known.
        measured: Whether prompts were measured; else they are assumed.
    """

    task: Task
    tokenizer: Any
    tokens: int
    held_out: int | None
    measured: bool


class StandIn(BaseTask):
    """A task whose prompts are numbers, or those of another task, and whose rewards alternate.

    Args:
        tokens: Tokens of the longest prompt; the others have one fewer, so that batches are padded.
        source: The task that asks; None for numbers.
    """

    name = "a plan"

    def __init__(self, tokens: int, source: Any = None) -> None:
        self.tokens = tokens
        self.source = source
        self.asked = 0

    def load_rows(self, source: str) -> Sequence[Example]:
        """Return the examples of the other task, or numbers."""
        if self.source is not None:
            rows: Sequence[Example] = self.source.examples(source)
            return rows
        return [{"number": number} for number in range(SAMPLE)]

    def prompt(self, example: Example) -> str | Chat:
        """Return the other task's prompt, or as many numbers as tokens are asked for."""
        if self.source is not None:
            prompt: str | Chat = self.source.prompt(example)
            return prompt
        number = example["number"]
        length = self.tokens - (1 if number % SAMPLE else 0)
        return " ".join(str(7 * number + place) for place in range(max(1, length)))

    def template(self, example: Example) -> Template | None:
        """Return the other task's template."""
        return None if self.source is None else self.source.template(example)

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return 0 and 1 in turn, so that all completions are learned from."""
        self.asked += 1
        return {"stand_in": float(self.asked % 2)}

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return no accuracy."""
        return {"accuracy": 0.0}


def prompting(cfg: DictConfig) -> Prompting:
    """Return the prompts to plan with: measured ones if they need no download, else typical ones.

    Args:
        cfg: Configuration of the plan.
    """
    name = str(cfg.task._target_).rpartition(".")[2]
    given = cfg.get("prompt_tokens")
    found = None if given is not None else _measured(cfg)
    if found is not None:
        return found
    tokens = given or TYPICAL.get(name, OTHERWISE)
    size = int(cfg.model.network.config.vocab_size)
    held_out = cfg.task.get("eval_size") or HELD_OUT.get(name)
    return Prompting(StandIn(tokens), Numbers(size), tokens, held_out, measured=False)


def _measured(cfg: DictConfig) -> Prompting | None:
    """Return a task's own prompts, if neither its data nor the tokenizer would have to be fetched."""
    if not (_tokenizer_is_here(cfg.model) and _data_are_here(cfg.task)):
        return None
    try:
        task, tokenizer = build(cfg.task), build(cfg.model.tokenizer)
        reader = Policy(nn.Identity(), tokenizer)  # type: ignore[arg-type]
        longest = max(len(reader.encode(task.prompt(row))) for row in task.examples("train")[:SAMPLE])
        held_out = len(task.examples("validation"))
    except (InputError, OSError):  # for example, the tokenizer can't read the task: training will say so
        return None
    return Prompting(StandIn(longest, task), tokenizer, longest, held_out, measured=True)


def _tokenizer_is_here(model: Mapping[str, Any]) -> bool:
    path = model["tokenizer"].get("path")
    return path is None or Path(str(path)).is_dir()


def _data_are_here(task: Mapping[str, Any]) -> bool:
    """Return whether a task makes its examples, or has files for both of their kinds."""
    paths = [task[name] for name in ("path", "train_path") if name in task]
    if "train_size" in task or not paths:
        return "hub" not in paths
    return paths[0] is not None and "hub" not in paths
