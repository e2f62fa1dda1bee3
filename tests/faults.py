"""Run an entry point with a fault planted: `python -m tests.faults <fault> <module> <argument> ...`.

The faults stand for what happens to real runs: a process killed at some moment, a disk that is full, a
number that is none.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Patch = Callable[[Any, str, Any], None]


def killed_while_saving(number: str, patch: Patch = setattr) -> None:
    """Die by SIGKILL when half of checkpoint file number `number`, from 1, has been written."""
    from spg.training.checkpoint_files import SummedFiles

    original, calls = SummedFiles.save_checkpoint, []

    def save(self: Any, checkpoint: Any, path: Any, *rest: Any, **more: Any) -> None:
        calls.append(path)
        original(self, checkpoint, path, *rest, **more)
        if len(calls) == int(number):
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    patch(SummedFiles, "save_checkpoint", save)


def killed_while_writing_slices(moment: str, patch: Patch = setattr) -> None:
    """Die by SIGKILL in writing number `<number>` of a checkpoint in slices, from 1, at a moment of it.

    Args:
        moment: `<number>-<moment>`. The moments are begun (half of this process's file), written (its whole
            file), described (the folder), named (by a file with a temporary name), replaced (the older file)
            and removing (the older folder, one file of it).
        patch: Replaces an attribute.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from spg.training.callbacks import checkpoints

    number, _, word = moment.partition("-")
    begun: list[int] = []

    def die(reached: str) -> None:
        if reached == word and len(begun) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    write, finish, replace, remove = (
        FileSystemWriter.write_data,
        FileSystemWriter.finish,
        os.replace,
        checkpoints.remove_unnamed,
    )

    def write_data(self: Any, *rest: Any) -> Any:
        begun.append(1)
        result = write(self, *rest)
        if word == "begun" and len(begun) == int(number):
            (own,) = Path(self.path).glob("__0_*")
            os.truncate(own, own.stat().st_size // 2)
        die("begun")
        die("written")
        return result

    def finish_writing(self: Any, *rest: Any, **more: Any) -> None:
        finish(self, *rest, **more)
        die("described")

    def replace_file(source: Any, target: Any) -> None:
        if str(target).endswith(".ckpt"):
            die("named")
        replace(source, target)
        if str(target).endswith(".ckpt"):
            die("replaced")

    def remove_folders(folder: Path) -> None:
        if word == "removing" and len(begun) == int(number):
            named = {torch.load(path)["slices"] for path in folder.glob("*.ckpt")}
            for path in folder.glob("*.slices"):
                if path.name not in named:
                    (path / "__0_0.distcp").unlink()
                    die("removing")
        remove(folder)

    patch(FileSystemWriter, "write_data", write_data)
    patch(FileSystemWriter, "finish", finish_writing)
    patch(os, "replace", replace_file)
    patch(checkpoints, "remove_unnamed", remove_folders)


def full_disk(kilobytes: str, patch: Patch = setattr) -> None:
    """Let no file grow beyond so many kilobytes, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(kilobytes) * 1024,) * 2)


def reward_is_nan(call: str, patch: Patch = setattr) -> None:
    """Make the reward number `call`, from 0, NaN."""
    from spg.tasks.sudoku import Sudoku

    original, calls = Sudoku.reward, []

    def reward(self: Any, example: Any, completion: str) -> dict[str, float]:
        calls.append(1)
        parts = original(self, example, completion)
        return {name: float("nan") for name in parts} if len(calls) == int(call) + 1 else parts

    patch(Sudoku, "reward", reward)


def _change_logps(update: str, patch: Patch, change: Callable[..., torch.Tensor]) -> None:
    """Let `change` have the log-probabilities, sequence numbers and scored positions of an update, from 1."""
    from spg.training.module import Training
    from spg.training.update import ExactGradient

    modules: list[Training] = []
    begin, compute = Training.__init__, ExactGradient.token_logps

    def init(self: Any, *rest: Any, **more: Any) -> None:
        begin(self, *rest, **more)
        modules.append(self)

    def token_logps(self: Any, batch: Any, piece: Any) -> torch.Tensor:
        logps = compute(self, batch, piece)
        if modules[-1].updates + 1 == int(update):
            index = batch.experience.rollout.index[piece.rows]
            logps = change(logps, index, batch.samples.scored[piece.at])
        return logps

    patch(Training, "__init__", init)
    patch(ExactGradient, "token_logps", token_logps)


def loss_is_inf(update: str, patch: Patch = setattr) -> None:
    """Make the third sequence's log-probabilities infinite in update number `update`, from 1."""

    def change(logps: torch.Tensor, index: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        return torch.where((index == 2).unsqueeze(-1) & scored, logps - torch.inf, logps)

    _change_logps(update, patch, change)


class _Sick(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * torch.nan


def gradient_is_nan(update: str, patch: Patch = setattr) -> None:
    """Make the gradient through the sixth sequence NaN, its loss being finite, in update `update`."""

    def change(logps: torch.Tensor, index: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        rows = (index == 5).nonzero().flatten()
        return logps.index_put((rows,), _Sick.apply(logps[rows]))

    _change_logps(update, patch, change)


def interrupted(update: str, patch: Patch = setattr) -> None:
    """Press Ctrl-C while the metrics of update number `update` are logged."""
    signalled(f"INT@{update}", patch)


def signalled(value: str, patch: Patch = setattr) -> None:
    """Send this process signals while the metrics of an update are logged: `USR1@4`, `USR1,TERM@4`."""
    from spg.training.module import Training

    original = Training.record
    names, update = value.split("@")

    def record(self: Any, metrics: dict[str, float], at: int) -> None:
        original(self, metrics, at)
        if at == int(update) and "loss" in metrics:
            for name in names.split(","):
                os.kill(os.getpid(), signal.Signals[f"SIG{name}"])

    patch(Training, "record", record)


def terminated_at_first_evaluation(path: str, patch: Patch = setattr) -> None:
    """Send SIGTERM to this process when the base model is evaluated, once."""
    from spg.training.module import Training

    original, calls = Training.evaluate, []

    def evaluate(self: Any, split: str) -> Any:
        calls.append(split)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, split)

    patch(Training, "evaluate", evaluate)


def fails_at(update: str, patch: Patch = setattr) -> None:
    """Raise in update number `update`, from 1."""
    from spg.training.module import Training

    original = Training.update

    def fail(self: Any, *rest: Any) -> Any:
        if self.updates + 1 == int(update):
            raise ZeroDivisionError("planted")
        return original(self, *rest)

    patch(Training, "update", fail)


def fails_where(key: str, patch: Patch = setattr) -> None:
    """Raise in the training of runs whose folder's name holds `key`."""
    import spg.cli.train

    original = spg.cli.train.train

    def train(run: Any) -> Any:
        if key in run.folder.name:
            raise ZeroDivisionError("planted")
        return original(run)

    patch(spg.cli.train, "train", train)


if __name__ == "__main__":
    fault, value = sys.argv[1].split("=")
    globals()[fault](value)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
