"""Evaluations: what they leave, going on after interruptions, batches, samples, early refusals."""

from __future__ import annotations

import logging
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from spg import config
from spg.cli import evaluate
from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.errors import InputError
from spg.evaluation.generations import Generations
from spg.evaluation.tables import score_context
from spg.models import base_weights
from spg.rollout import collect
from spg.runs.status import read_status, write_status
from spg.tasks.sudoku import Sudoku
from spg.training import pretraining
from tests import warm
from tests.helpers import ROOT, command, train_here
from tests.unit.evaluation.helpers import (
    SMALL,
    evaluated,
    lines,
    read,
    saved,
    settings,
)


def test_what_an_evaluation_leaves(whole: Path) -> None:
    record = read(whole)
    assert (record["task"], record["split"], record["n"]) == ("sudoku", "heldout", 20)
    assert (record["parser"], record["shots"], record["device"]) == ("exact", 0, "cpu")
    assert (record["precision"], record["selection"]) == ("float32", None)
    found = record["results"]["base"]
    assert (found["n"], found["completions"], found["pass@k"]) == (20, 20, None)
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert found["interval_method"] == "bootstrap over examples", "cells are fractions"
    assert found["measures"]["solved"]["interval_method"] == "wilson"
    assert found["effective_length"] == 24
    assert 1 <= found["tokens_per_step"] <= 3
    assert found["steps"] == pytest.approx(sum(line["steps"] for line in lines(whole)) / 20)
    expected = {"gen_length": 24, "steps": 8, "block_size": 12, "temperature": 0, "samples": 1, "threads": 1}
    assert expected.items() <= record["settings"].items()
    assert {"spg", "torch"} <= record["versions"].keys()
    written = lines(whole)
    assert [(line["model"], line["index"], line["sample"]) for line in written] == [
        ("base", index, 0) for index in range(20)
    ]
    task = Sudoku(eval_size=10)
    for line, example in zip(written, task.examples("heldout"), strict=True):
        assert line["example"] == example
        assert line["prompt"] == task.prompt(example)
        assert line["answer"] == task.answer(example, line["completion"])
        assert line["measures"] == task.measure(example, line["completion"])
        accuracy = line["measures"]["accuracy"]
        assert line["correct"] is (accuracy == 1) if accuracy in (0, 1) else line["correct"] == accuracy
        assert line["decoded"] == example["puzzle"].count("0")
    mean = sum(line["measures"]["accuracy"] for line in written) / 20
    assert found["accuracy"] == pytest.approx(mean)
    assert found["near_ties"] == sum(line["near_ties"] for line in written)
    assert read_status(whole)["state"] == "finished"


@pytest.mark.long
def test_batches_of_any_size_give_the_same_completions(tmp_path: Path) -> None:
    """Where rounding could turn a decision, the line says so."""
    for size in (1, 16):
        evaluated(tmp_path / str(size), f"eval_batch_size={size}", "task.eval_size=24")
    for one, many in zip(lines(tmp_path / "1"), lines(tmp_path / "16"), strict=True):
        assert one["completion"] == many["completion"] or one["near_ties"]


def cut(whole: Path, folder: Path, after: int, half: bool) -> list[str]:
    """Leave in `folder` what a kill after `after` lines would have left, and return these lines."""
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    kept = (whole / "generations.jsonl").read_text().splitlines(keepends=True)
    rest = kept[after][: len(kept[after]) // 2] if half else ""
    (folder / "generations.jsonl").write_text("".join(kept[:after]) + rest)
    write_status(folder, state="running")
    return kept[:after]


@pytest.mark.parametrize("half", [False, True])
def test_killed_anywhere_it_goes_on_to_the_same_results(
    whole: Path, tmp_path: Path, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = random.Random(half).randrange(1, 19)
    kept = cut(whole, tmp_path / "cut", after, half)
    decoded: list[int] = []
    original = collect.complete

    def complete(policy: Any, decoder: Any, task: Any, examples: Any, *rest: Any) -> Any:
        decoded.append(len(examples))
        return original(policy, decoder, task, examples, *rest)

    monkeypatch.setattr(collect, "complete", complete)
    evaluate.resume(str(tmp_path / "cut"), [])
    assert sum(decoded) == 20 - after // 8 * 8, "batches that were done are not decoded again"
    assert (tmp_path / "cut" / "generations.jsonl").read_text().splitlines(keepends=True)[:after] == kept
    assert lines(tmp_path / "cut") == lines(whole)
    assert read(tmp_path / "cut") == read(whole)
    with pytest.raises(ConfigError, match="this evaluation is finished"):
        evaluate.resume(str(tmp_path / "cut"), [])


def test_what_is_complete_is_not_decoded_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "done")
    write_status(tmp_path / "done", state="interrupted")
    monkeypatch.setattr(collect, "complete", None)
    evaluate.resume(str(tmp_path / "done"), ["eval_batch_size=3"])
    assert read(tmp_path / "done")["results"] == read(whole)["results"]


def test_ctrl_c_says_how_to_go_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    overrides = ["eval_batch_size=1", "task.eval_size=400", "threads=1", f"hydra.run.dir={folder}"]
    process = warm.Popen(command("evaluate", *overrides), cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (folder / "generations.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert f"go on with: python -m spg.evaluate resume={folder}" in text
    assert "Traceback" not in text
    assert read_status(folder)["state"] == "interrupted"
    assert 1 <= len(Generations(folder / "generations.jsonl").lines) < 800


def test_another_model_does_not_go_on_with_the_lines(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    evaluated(tmp_path / "e", f"run={tmp_path / 'run'}")
    write_status(tmp_path / "e", state="interrupted")
    final = tmp_path / "run" / "weights.safetensors"
    final.touch()
    with pytest.raises(ConfigError, match=r"made with another weights\.safetensors"):
        evaluate.resume(str(tmp_path / "e"), [])


def test_without_lines_it_goes_on_with_another_model(whole: Path, tmp_path: Path) -> None:
    cut(whole, tmp_path / "cut", 0, half=False)
    write_status(tmp_path / "cut", made_with={"device": "another"})
    evaluate.resume(str(tmp_path / "cut"), [])
    assert read(tmp_path / "cut")["results"] == read(whole)["results"]
    assert read_status(tmp_path / "cut")["made_with"] == {"device": "cpu"}


def test_samples_give_pass_at_k_and_their_own_streams(tmp_path: Path) -> None:
    sampled = ("temperature=0.9", "task.eval_size=4", "task.max_empty=4")
    record = evaluated(tmp_path / "many", *sampled, "samples=3", "eval_batch_size=5")
    found = record["results"]["base"]
    assert (found["n"], found["completions"], list(found["pass@k"])) == (8, 24, ["1", "2", "3"])
    written = lines(tmp_path / "many")
    right: dict[int, list[bool]] = {}
    for line in written:
        right.setdefault(line["index"], []).append(line["measures"]["accuracy"] == 1)
    assert found["pass@k"]["1"] == pytest.approx(sum(map(sum, right.values())) / 24)
    assert found["pass@k"]["3"] == pytest.approx(sum(map(any, right.values())) / 8)
    assert found["near_ties"] is None, "a draw has no best alternative"
    evaluated(tmp_path / "one", *sampled)
    first = [line["completion"] for line in written if line["sample"] == 0]
    assert first == [line["completion"] for line in lines(tmp_path / "one")]
    texts = {(line["index"], line["sample"]): line["completion"] for line in written}
    assert any(texts[i, 0] != texts[i, 1] for i in range(8))
    again = settings(*SMALL, "parser=exact", f"generations={tmp_path / 'many' / 'generations.jsonl'}")
    evaluate.start(again, tmp_path / "again")
    assert read(tmp_path / "again")["results"]["base"] == found
    assert read(tmp_path / "again")["split"] == "as in the file"


def test_samples_at_random_remasking_differ_and_show_their_seed(tmp_path: Path) -> None:
    record = evaluated(tmp_path / "e", "decoding.remasking=random", "samples=2", "seed=7")
    texts = {(line["index"], line["sample"]): line["completion"] for line in lines(tmp_path / "e")}
    assert any(texts[i, 0] != texts[i, 1] for i in range(20))
    assert any("temperature 0, 2 samples, seed 7" in line for line in score_context(record))


def test_a_run_s_directory_is_not_evaluated_into_nor_the_other_way_round(
    trained: Path, whole: Path, tmp_path: Path
) -> None:
    before = {name: (trained / name).read_text() for name in ("config.yaml", "status.json")}
    with pytest.raises(ConfigError, match=r"holds a training run; give another hydra\.run\.dir"):
        evaluated(trained)
    assert before == {name: (trained / name).read_text() for name in before}
    shutil.copy(trained / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match="holds a training run"):
        evaluated(tmp_path)
    before = {"config.yaml": (whole / "config.yaml").read_text()}
    with pytest.raises(ConfigError, match="holds an evaluation"):
        train_here(whole)
    assert before == {"config.yaml": (whole / "config.yaml").read_text()}


def test_what_the_model_can_t_read_is_told_before_any_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_weights, "look_up", None)
    words = r"this model can't read chats, in which {}.* choose {}an instruction-tuned model"
    bare = words.format("sudoku asks", r"task\.prompt_style=bare, or ")
    for name, start in (("e", evaluated), ("t", train_here)):
        with pytest.raises(ConfigError, match=bare):
            start(tmp_path / name, "task.prompt_style=instruct", "task.train_size=20")
    for split in ("train", "test"):
        saved(tmp_path / f"{split}.jsonl", *[{"question": "1+1?", "answer": "#### 2"}] * 3)
    own = ("task=gsm8k", f"task.path={tmp_path}")
    with pytest.raises(ConfigError, match=words.format("gsm8k asks", "")):
        evaluate.start(settings(*own), tmp_path / "g")
    cfg = config.compose("pretrain", [*own, f"task.train_path={tmp_path}"])
    with pytest.raises(ConfigError, match=words.format("gsm8k asks", "")):
        pretraining.pretrain(cfg, tmp_path)


def test_a_device_that_is_not_there_is_told_before_any_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(base_weights, "look_up", None)
    with pytest.raises(ConfigError, match="accelerator=cuda: torch finds no CUDA device here"):
        evaluated(tmp_path / "e", "accelerator=cuda")
    with pytest.raises(ConfigError, match=r"give trainer\.accelerator=cpu, or auto"):
        train_here(tmp_path / "t", "trainer.accelerator=cuda")


def test_an_example_that_the_tokenizer_can_t_write_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Sudoku.prompt
    last = Sudoku(eval_size=10).examples("heldout")[-1]
    monkeypatch.setattr(Sudoku, "prompt", lambda task, e: "é" if e == last else original(task, e))
    with pytest.raises(
        InputError, match="example 19 of split heldout can't be completed: the tokenizer has no"
    ):
        evaluated(tmp_path / "e")
    assert not (tmp_path / "e" / "generations.jsonl").exists()


def test_lightning_is_quiet_when_base_weights_are_made_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning sets its loggers up when it is imported, in the middle of an evaluation."""
    made = base_weights.look_up(settings())

    class Imported(ModuleType):
        def __getattr__(self, name: str) -> Any:
            logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
            return lambda cfg: made

    monkeypatch.setattr(base_weights, "look_up", lambda cfg: None)
    monkeypatch.setitem(sys.modules, "spg.training.pretraining", Imported("spg.training.pretraining"))
    evaluated(tmp_path / "e", "task.eval_size=2")
    assert logging.getLogger("lightning.pytorch").level == logging.WARNING


def test_what_can_t_go_on_is_refused(whole: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds an evaluation already"):
        evaluated(whole)
    with pytest.raises(ConfigError, match="is not the directory of an evaluation"):
        evaluate.resume(str(trained), [])
    with pytest.raises(ConfigError, match="is not the configuration of a run"):
        resume(str(whole), [])
    cut(whole, tmp_path / "cut", 3, half=False)
    with pytest.raises(ConfigError, match=r"a run goes on with its own settings \(seed=0"):
        evaluate.resume(str(tmp_path / "cut"), ["seed=1"])


def test_an_evaluation_says_what_a_factor_saved(tmp_path: Path, whole: Path) -> None:
    record = evaluated(tmp_path / "dual", "task.eval_size=4", "decoding.factor=1.5", "decoding.cache=dual")
    found, made = record["results"]["base"], lines(tmp_path / "dual")
    assert found["tokens_per_step"] == sum(line["decoded"] for line in made) / sum(x["steps"] for x in made)
    assert found["tokens_per_step"] > 1
    assert found["steps"] == sum(line["steps"] for line in made) / 8
    assert "24 tokens by factor 1.5, blocks of 12" in score_context(record)[1]
    assert "24 tokens in 8 steps, blocks of 12" in score_context(read(whole))[1]
