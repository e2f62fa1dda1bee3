"""Evaluation: what it leaves, going on, batches, samples, selection, saved generations, multiruns."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from spg import config
from spg.cli import evaluate, launch
from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.console import console
from spg.core.errors import InputError
from spg.core.files import write_json
from spg.core.statistics import wilson
from spg.evaluation import checkpoints
from spg.evaluation.comparison import report_multirun
from spg.evaluation.generations import Generations, read_generations
from spg.evaluation.metrics import summarize
from spg.evaluation.selection import describe_selection, run_weights
from spg.evaluation.settings import merge_settings
from spg.evaluation.tables import score_context, show_results
from spg.models import base_weights
from spg.rollout import collect
from spg.runs import directory as runs
from spg.runs.identity import OtherRunError
from spg.runs.status import lock, read_status, write_status
from spg.tasks.sudoku import Sudoku
from spg.training import pretraining
from tests import warm
from tests.helpers import ROOT, command, run, train_here

SMALL = ("task.eval_size=10", "threads=1", "eval_batch_size=8")


def settings(*overrides: str) -> Any:
    return merge_settings(config.compose("evaluate", list(overrides)), list(overrides))


def evaluated(folder: Path, *overrides: str) -> dict[str, Any]:
    """Evaluate in this process and return what results.json holds."""
    evaluate.start(settings(*SMALL, *overrides), folder)
    return read(folder)


def read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return record


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation of the base model that nothing interrupted."""
    folder = tmp_path_factory.mktemp("evaluations") / "whole"
    evaluated(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that kept two checkpoints beside best and last."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return train_here(
        folder, "mu=2", "task.eval_size=8", "trainer.keep_every=4", "trainer.prompts_per_rollout=2"
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


def test_the_table_says_what_two_scores_must_share(whole: Path) -> None:
    with console.capture() as printed:
        show_results(read(whole))
    text = printed.get()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("sudoku, split heldout", "parser exact", "shots 0", "24 tokens in 8 steps, blocks of 12"):
        assert words in text
    for words in ("temperature 0", "model LLaDA, weights base", "cpu, float32", "near", "a step"):
        assert words in text
    assert f"{100 * read(whole)['results']['base']['accuracy']:.2f}" in text


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


def test_the_checkpoint_that_validation_chose_is_marked(trained: Path, tmp_path: Path) -> None:
    record = evaluated(tmp_path / "e", f"run={trained}", "task.eval_size=8")
    assert list(record["results"]) == ["base", "checkpoints/best.ckpt", "weights.safetensors"]
    assert record["split"] == "test", "the half that chose no checkpoint"
    assert (record["selection"]["rule"], record["selection"]["chosen"]) == (
        "validation",
        "checkpoints/best.ckpt",
    )
    summary = json.loads((trained / "summary.json").read_text())
    for model, moment in zip(record["results"], ("before", "after", "last"), strict=True):
        assert record["results"][model]["accuracy"] == pytest.approx(summary[f"accuracy.{moment}"])


def test_by_test_average_every_checkpoint_is_scored_and_it_is_said(trained: Path, tmp_path: Path) -> None:
    record = evaluated(tmp_path / "e", f"run={trained}", "select=test_average")
    names = [f"checkpoints/{name}.ckpt" for name in ("best", "last", "update-000004", "update-000008")]
    assert list(record["results"]) == ["base", *names]
    accuracies = {name: record["results"][name]["accuracy"] for name in names}
    assert accuracies[record["selection"]["chosen"]] == max(accuracies.values())
    assert record["split"] == "heldout"
    with console.capture() as printed:
        show_results(record)
    words = "chosen on the scored items themselves, both halves, by the best average, as published"
    assert words in printed.get()
    assert f"{record['selection']['chosen']} *" in printed.get()


def test_a_run_without_final_weights_has_its_last_checkpoint(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").unlink()
    (tmp_path / "run" / "checkpoints" / "replaced-best.ckpt").touch()
    names = [name for name, _ in run_weights(tmp_path / "run", "validation")]
    assert names == ["checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    assert len(run_weights(tmp_path / "run", "test_average")) == 4
    with pytest.raises(ConfigError, match="holds neither checkpoints nor weights"):
        run_weights(tmp_path / "none", "validation")


def test_a_run_s_settings_hold_unless_they_are_overridden(trained: Path, tmp_path: Path) -> None:
    given = f"run={trained}"
    cfg = settings(given)
    assert (cfg.task.eval_size, cfg.split, cfg.gen_length, cfg.decoding.steps) == (8, "test", 24, 8)
    cfg = settings(given, "gen_length=48")
    assert (cfg.decoding.gen_length, cfg.decoding.steps, cfg.decoding.block_size) == (48, 16, 12)
    cfg = settings(given, "gen_length=48", "decoding.steps=24", "block_size=6", "task.data_seed=3")
    assert (cfg.decoding.steps, cfg.decoding.block_size, cfg.task.data_seed) == (24, 6, 3)
    cfg = settings(given, "gen_length=36", "decoding=full_sequence", "split=validation")
    assert (cfg.decoding.steps, cfg.decoding.block_size, cfg.split) == (12, 36, "validation")
    cfg = settings(given, "task=sudoku", "task.format=completion", "parser=d1")
    assert (cfg.gen_length, cfg.block_size, cfg.decoding.gen_length) == (16, 8, 16), "the task's own"
    assert (cfg.task.eval_size, cfg.task.parser) == (256, "d1")
    full = tmp_path / "full"
    runs.write_config(config.compose("config", ["decoding=full_sequence"]), full.parent)
    cfg = settings(f"run={full.parent}", "gen_length=48")
    assert (cfg.decoding.block_size, cfg.decoding.steps) == (48, 16)


def test_a_model_is_asked_in_its_own_style(trained: Path, tmp_path: Path) -> None:
    given = ("model=llada_8b", f"model.path={tmp_path}")
    cfg = settings(*given)
    assert (cfg.task.prompt_style, cfg.task.format, cfg.task.shots) == ("instruct", "completion", 3)
    assert (cfg.gen_length, cfg.decoding.block_size, cfg.decoding.steps) == (256, 32, 128)
    cfg = settings(*given, "task=countdown", "task.operations=+")
    assert (cfg.task.prompt_style, cfg.task.operations, cfg.task.max_number) == ("instruct", "+", 100)
    cfg = settings(f"run={trained}")
    assert (cfg.task.prompt_style, cfg.gen_length) == ("bare", 24)

    # a run's settings hold, and with another task those that its model is asked that one with
    lines = [*given, "task.shots=1", "gen_length=128"]
    runs.write_config(config.compose("config", lines), tmp_path)
    cfg = settings(f"run={tmp_path}")
    assert (cfg.task.format, cfg.task.shots, cfg.gen_length, cfg.decoding.steps) == ("completion", 1, 128, 64)
    cfg = settings(f"run={tmp_path}", "gen_length=512")
    assert (cfg.task.shots, cfg.decoding.gen_length, cfg.decoding.steps) == (1, 512, 256)
    cfg = settings(f"run={tmp_path}", "task=countdown")
    assert (cfg.task.prompt_style, cfg.task.max_number) == ("instruct", 100)
    assert (cfg.gen_length, cfg.decoding.gen_length, cfg.decoding.steps) == (256, 256, 128)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["samples=4"], "give temperature=0.9, decoding.remasking=random, or samples=1"),
        (["decoding.temperature=0.5"], r"an evaluation has its own: temperature=0\.5"),
        (["generations=x.jsonl", "decoding=full_random"], "decoding=... can't be given with generations"),
        *(
            (["generations=x.jsonl", line], f"{line} can't be given with generations")
            for line in (
                "gen_length=8",
                "temperature=0.5",
                "decoding.steps=3",
                "model.weights=random",
                "block_size=4",
                "seed=3",
                "accelerator=cpu",
                "select=validation",
            )
        ),
        (["generations=x.jsonl", "run=y"], "run=y can't be given with generations"),
        (["generations=x.jsonl", "split=test"], "split=test can't be given with generations"),
        (["run=missing"], "run=missing is no run's directory"),
        (["select=best"], "allowed: one of: validation, test_average"),
        (["split=train"], "allowed: one of: auto, validation, test, heldout"),
        (["parser=nonsense"], "parser=nonsense"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(*overrides)


def test_samples_at_random_remasking_differ_and_show_their_seed(tmp_path: Path) -> None:
    record = evaluated(tmp_path / "e", "decoding.remasking=random", "samples=2", "seed=7")
    texts = {(line["index"], line["sample"]): line["completion"] for line in lines(tmp_path / "e")}
    assert any(texts[i, 0] != texts[i, 1] for i in range(20))
    assert any("temperature 0, 2 samples, seed 7" in line for line in score_context(record))


def test_samples_of_a_run_depend_on_its_own_decoding(tmp_path: Path) -> None:
    runs.write_config(config.compose("config", ["decoding.remasking=random"]), tmp_path)
    assert settings(f"run={tmp_path}", "samples=2").decoding.remasking == "random"
    with pytest.raises(ConfigError, match="2 times the same"):
        settings(f"run={tmp_path}", "samples=2", "decoding.remasking=margin")


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


def test_a_finished_job_whose_run_went_on_is_left_alone(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    cfg = settings(*SMALL, f"run={tmp_path / 'run'}", "task.eval_size=4")
    job = tmp_path / "m" / "job"
    job.mkdir(parents=True)
    evaluate.sweep_job(cfg, job, {})
    before = read(job)
    evaluate.sweep_job(cfg, job, {})
    (tmp_path / "run" / "checkpoints" / "best.ckpt").touch()
    with pytest.raises(OtherRunError, match=r"figures of checkpoints/best\.ckpt as it was before"):
        evaluate.sweep_job(cfg, job, {})
    (tmp_path / "run" / "weights.safetensors").unlink()
    with pytest.raises(OtherRunError, match=r"checkpoints/last\.ckpt, weights\.safetensors"):
        evaluate.sweep_job(cfg, job, {})
    assert read(job) == before


def test_without_lines_it_goes_on_with_another_model(whole: Path, tmp_path: Path) -> None:
    cut(whole, tmp_path / "cut", 0, half=False)
    write_status(tmp_path / "cut", made_with={"device": "another"})
    evaluate.resume(str(tmp_path / "cut"), [])
    assert read(tmp_path / "cut")["results"] == read(whole)["results"]
    assert read_status(tmp_path / "cut")["made_with"] == {"device": "cpu"}


def test_paths_in_the_configuration_do_not_depend_on_the_directory(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    assert settings("run=trained").run == str(trained)
    assert settings("generations=g.jsonl").generations == str(trained.parent / "g.jsonl")


def older(trained: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    cfg = runs.read_config(trained)
    change(cfg)
    folder.mkdir()
    runs.write_config(cfg, folder)
    return folder


def test_a_run_of_an_older_version_is_read_as_it_would_be_now(trained: Path, tmp_path: Path) -> None:
    def as_before(cfg: Any) -> None:
        cfg.task.reward = "cells"
        for key in ("lora", "prompt_style"):
            del cfg.model[key]
        for key in ("parser", "prompt_file", "prompt_style", "shots"):
            del cfg.task[key]

    cfg = settings(f"run={older(trained, tmp_path / 'old', as_before)}")
    assert (cfg.task.reward, cfg.task.parser, cfg.task.prompt_file) == ("released", "exact", None)
    assert (cfg.model.lora, cfg.task.eval_size) == (None, 8)
    assert (cfg.model.prompt_style, cfg.task.prompt_style, cfg.task.shots) == ("bare", "bare", 0)
    base = checkpoints._model_settings(cfg)
    assert base_weights.file_name(base) == base_weights.file_name(runs.read_config(trained))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("task.difficulty", 3, r"there is no setting task\.difficulty any more"),
        ("task.reward", "digits", r"task\.reward=digits: out of range"),
        ("pretrain", None, "its config.yaml has no pretrain"),
    ],
)
def test_a_run_that_this_version_can_t_read_is_said_to_be_another_s(
    trained: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    def change(cfg: Any) -> None:
        if value is None:
            del cfg[key]
        else:
            OmegaConf.update(cfg, key, value)

    with pytest.raises(ConfigError, match=f"is of another version of this project: {words}"):
        settings(f"run={older(trained, tmp_path / 'old', change)}")


def test_settings_of_a_run_s_task_can_be_given_without_choosing_it(tmp_path: Path) -> None:
    runs.write_config(config.compose("config", ["task=countdown", "task.eval_size=9"]), tmp_path)
    line = f"run={tmp_path}"
    assert config.task_of_run([line, "task.max_number=5"]) == "task=countdown"
    for chosen in ([line, "task=sudoku"], [], ["run=missing"], [f"{line},missing"]):
        assert config.task_of_run(chosen) is None
    code = (
        "from spg.cli import evaluate, launch\nimport sys\n"
        f"sys.argv = ['evaluate', '{line}', 'task.max_number=5', 'hydra.run.dir={tmp_path / 'e'}']\n"
        "evaluate.start = lambda cfg, folder: print(cfg.task.max_number, cfg.task.eval_size)\n"
        "launch.run('evaluate', evaluate.job)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "5 9\n", done.stderr


@pytest.mark.parametrize("module", ["evaluate", "config"])
def test_a_folder_that_can_t_be_written_is_one_line(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        monkeypatch.setattr(sys, "argv", [module, f"hydra.run.dir={folder}"])
        with pytest.raises(SystemExit) as ended:
            launch.run(module, print)
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("hydra.run.dir: nothing can be written there")
        assert told.count("\n") == 1
        with pytest.raises(InputError, match="can't be written to"), lock(folder):
            pass


def test_a_job_s_own_error_is_not_taken_for_the_folder_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(cfg: Any) -> None:
        raise PermissionError("of the job")

    with pytest.raises(ValueError, match="a bug"), launch._writable("x"):
        raise ValueError("a bug")
    monkeypatch.setattr(sys, "argv", ["evaluate", f"hydra.run.dir={tmp_path}"])
    ended = SimpleNamespace(return_value=None)
    monkeypatch.setattr(
        "hydra._internal.hydra.run_job", lambda task_function, **rest: task_function(None) or ended
    )
    with pytest.raises(PermissionError, match="of the job"):
        launch.run("evaluate", job)


def test_what_can_t_go_on_is_refused(whole: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds an evaluation already"):
        evaluated(whole)
    with pytest.raises(ConfigError, match="is no evaluation's directory"):
        evaluate.resume(str(trained), [])
    with pytest.raises(ConfigError, match="is no run's configuration"):
        resume(str(whole), [])
    cut(whole, tmp_path / "cut", 3, half=False)
    with pytest.raises(ConfigError, match=r"a run goes on with its own settings \(seed=0"):
        evaluate.resume(str(tmp_path / "cut"), ["seed=1"])


PUZZLE, SOLUTION = "4320004330100004", "4321124334122134"
ASKED = {"question": f"Solve the following Sudoku puzzle: {PUZZLE}\n", "ground_truth": SOLUTION}


def saved(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_saved_generations_are_scored_without_torch(tmp_path: Path) -> None:
    right, wrong = f"<answer>\n{SOLUTION}\n</answer>", f"<answer>\n{PUZZLE}\n</answer>"
    file = saved(tmp_path / "g.jsonl", {**ASKED, "generation": right}, {**ASKED, "generations": wrong})
    argv = ["evaluate", f"generations={file}", "parser=d1", f"hydra.run.dir={tmp_path / 'e'}"]
    code = (
        f"import sys, runpy\nsys.argv = {argv}\n"
        "try:\n    runpy.run_module('spg.evaluate', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50.00" in done.stdout
    record = read(tmp_path / "e")
    found = record["results"]["g.jsonl"]
    assert (found["accuracy"], found["interval_method"], found["n"]) == (0.5, "wilson", 2)
    assert (found["effective_length"], record["split"], record["parser"]) == (None, "as in the file", "d1")
    assert [line["correct"] for line in lines(tmp_path / "e")] == [True, False]


def test_a_list_of_generations_is_samples_and_lines_are_scored_per_model(tmp_path: Path) -> None:
    task = Sudoku(parser="d1")
    models = read_generations(saved(tmp_path / "g.jsonl", {**ASKED, "generations": ["a", "b"]}), task)
    (items,) = models.values()
    assert [(item.index, item.sample, completion.text) for item, completion in items] == [
        (0, 0, "a"),
        (0, 1, "b"),
    ]
    own = {"index": 0, "sample": 0, "completion": "c", "example": {"puzzle": PUZZLE, "solution": SOLUTION}}
    rows = [{**own, "model": model} for model in ("base", "checkpoints/best.ckpt")]
    assert list(read_generations(saved(tmp_path / "h.jsonl", *rows), task)) == [
        "base",
        "checkpoints/best.ckpt",
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ASKED, "line 2: no completion's text; expected it under one of completion, generation, generations"),
        ({**ASKED, "generation": 3}, "line 2: no completion's text"),
        ({"generation": "x", "ground_truth": SOLUTION}, "line 2: "),
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        *(
            ({**ASKED, "generation": "x", "example": wrong}, "line 2: `example` is .*; expected an object")
            for wrong in (None, 5, "x", [1])
        ),
        (
            {**ASKED, "completion": "x", "sample": 0},
            "line 2: the line has sample; then it needs index and model",
        ),
    ],
)
def test_lines_that_can_t_be_used_are_named(tmp_path: Path, row: Any, words: str) -> None:
    file = saved(tmp_path / "g.jsonl", {**ASKED, "generation": "x"}, row)
    with pytest.raises(InputError, match=words) as caught:
        read_generations(file, Sudoku(parser="d1"))
    assert str(file) in str(caught.value)


def test_files_that_can_t_be_used_are_named(tmp_path: Path) -> None:
    task = Sudoku(parser="d1")
    with pytest.raises(InputError, match="can't be read"):
        read_generations(tmp_path / "missing.jsonl", task)
    with pytest.raises(InputError, match="has no lines"):
        read_generations(saved(tmp_path / "empty.jsonl"), task)
    own = {"model": "base", "index": 0, "sample": 0, "completion": "c"}
    twice = {**own, "example": {"puzzle": PUZZLE, "solution": SOLUTION}}
    with pytest.raises(InputError, match="line 2: sample 0 of example 0 of base is there already"):
        read_generations(saved(tmp_path / "twice.jsonl", twice, twice), task)


def test_half_a_surrogate_pair_is_written_and_read_again(tmp_path: Path) -> None:
    file = saved(tmp_path / "g.jsonl", {**ASKED, "generation": "\ud800 é"}, {**ASKED, "generation": "x"})
    evaluate.start(settings("parser=d1", f"generations={file}"), tmp_path / "e")
    assert [line["completion"] for line in lines(tmp_path / "e")] == ["\ud800 é", "x"]
    assert read_generations(tmp_path / "e" / "generations.jsonl", Sudoku(parser="d1"))
    assert "é" in (tmp_path / "e" / "generations.jsonl").read_text()


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_where_all_samples_are_alike_the_interval_has_a_width(right: float) -> None:
    made = {"tokens": None, "decoded": None, "steps": None, "near_ties": None}
    rows = [{"index": n // 4, "measures": {"accuracy": right}, **made} for n in range(40)]
    found = summarize(rows)
    assert found["interval_method"] == "wilson"
    assert found["interval"] == list(wilson(int(10 * right), 10))
    rows[0]["measures"] = {"accuracy": 1 - right}
    assert summarize(rows)["interval_method"] == "bootstrap over examples"


@pytest.mark.parametrize(
    ("rule", "split", "scored_on", "among"),
    [
        ("validation", "test", "scored on the test half", False),
        ("validation", "heldout", "scored on both halves", True),
        ("validation", "validation", "scored on the validation half", True),
        ("test_average", "validation", "the scored items themselves, the validation half,", False),
        ("test_average", "test", "the scored items themselves, the test half,", False),
    ],
)
def test_the_words_of_a_selection_fit_the_split(rule: str, split: str, scored_on: str, among: bool) -> None:
    words = describe_selection(rule, split)
    assert scored_on in words
    assert ("the items it was chosen on are among those scored" in words) is among


def test_a_multirun_ends_with_one_table_and_does_only_what_is_left(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    words = [f"run={trained}", "--multirun", "gen_length=24,36", "threads=1", f"hydra.sweep.dir={folder}"]
    text = run("evaluate", *words)
    table = text[text.index("2 of 2 evaluations finished") :]
    assert all(word in table for word in ("24", "36", "average", "select=validation"))
    record = read(folder)
    assert [entry["model"] for entry in record["results"]] == [
        "base",
        "checkpoints/best.ckpt",
        "weights.safetensors",
    ]
    for entry in record["results"]:
        singles = [read(folder / f"gen_length-{n}")["results"][entry["model"]] for n in (24, 36)]
        assert [score["accuracy"] for score in entry["scores"].values()] == [s["accuracy"] for s in singles]
        assert entry["average"] == pytest.approx(sum(s["accuracy"] for s in singles) / 2)
        assert entry["chosen"] is (entry["model"] == "checkpoints/best.ckpt")
        assert f"{100 * entry['average']:.2f}" in table
    job = folder / "gen_length-36"
    kept = (job / "generations.jsonl").read_text().splitlines(keepends=True)
    (job / "generations.jsonl").write_text("".join(kept[:11]))
    write_status(job, state="interrupted")
    before = (folder / "gen_length-24" / "results.json").stat().st_mtime_ns
    again = run("evaluate", *words)
    assert f"Finished already: {folder / 'gen_length-24'}" in again
    assert (folder / "gen_length-24" / "results.json").stat().st_mtime_ns == before
    assert (job / "generations.jsonl").read_text() == "".join(kept)
    assert read(folder)["results"] == record["results"]


def made_up(folder: Path, values: dict[str, Any], accuracies: dict[str, float], rule: str) -> None:
    """Leave a job's folder as an evaluation would; without accuracies, as one that failed."""
    job = folder / "_".join(f"{key}-{value}" for key, value in values.items())
    job.mkdir(parents=True)
    if not accuracies:
        write_status(job, state="failed", error="no memory", overrides=values)
        return
    write_status(job, state="finished", error=None, overrides=values)
    found = {model: {"accuracy": a, "interval": [0, 1], "n": 5} for model, a in accuracies.items()}
    write_json(
        job / "results.json",
        {"results": found, "selection": {"rule": rule}, "parser": "d1", "shots": 0, "split": "heldout"},
    )


def test_by_test_average_each_task_has_its_checkpoint(tmp_path: Path) -> None:
    """Chosen by the mean over the lengths, not by any one of them; where one is missing, none is."""
    scores = {
        ("gsm8k", 128): {"base": 0.9, "a.ckpt": 0.5, "b.ckpt": 0.1},
        ("gsm8k", 256): {"base": 0.9, "a.ckpt": 0.5, "b.ckpt": 0.8},
        ("math500", 128): {"base": 0.1, "a.ckpt": 0.2, "b.ckpt": 0.3},
        ("math500", 256): {},
    }
    for (task, length), accuracies in scores.items():
        made_up(tmp_path, {"task": task, "gen_length": length}, accuracies, "test_average")
    write_json(tmp_path / "sweep.json", {"name": "s", "command": "c", "swept": ["task", "gen_length"]})
    with console.capture() as printed:
        report_multirun(tmp_path)
    text = printed.get()
    entries = {(entry["task"], entry["model"]): entry for entry in read(tmp_path)["results"]}
    assert entries["gsm8k", "a.ckpt"]["chosen"]
    assert entries["gsm8k", "a.ckpt"]["average"] == pytest.approx(0.5)
    assert sum(entry["chosen"] for entry in entries.values()) == 1
    assert entries["math500", "b.ckpt"]["average"] is None
    assert "50.00*" in text
    assert "3 of 4 evaluations finished" in text
    assert "task-math500_gen_length-256 failed: no memory" in text
    assert "chosen on the scored items themselves, both halves" in text


def test_a_rule_marks_among_what_was_made_with_it(tmp_path: Path) -> None:
    best, last = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
    for rule in ("validation", "test_average"):
        made_up(tmp_path, {"select": rule}, {"base": 0.1, best: 0.2, last: 0.9}, rule)
    write_json(tmp_path / "sweep.json", {"name": "s", "command": "c", "swept": ["select"]})
    with console.capture() as printed:
        report_multirun(tmp_path)
    marked = [(e["select"], e["model"]) for e in read(tmp_path)["results"] if e["chosen"]]
    assert sorted(marked) == [("test_average", last), ("validation", best)]
    assert list(read(tmp_path)["selection"]) == ["test_average", "validation"]
    assert printed.get().count("select=") == 2
