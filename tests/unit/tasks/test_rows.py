"""Where rows come from when the hub answers, refuses, or is not there."""

from __future__ import annotations

from pathlib import Path

import datasets
import huggingface_hub
import pytest

from spg import config
from spg.core.errors import InputError
from spg.core.hub import hub_answers
from spg.tasks.datasets import Published, load
from spg.tasks.prompts import PromptFile
from tests.helpers import small_policy

WHAT = Published("some/data", "train", ("question",))


class Refused(huggingface_hub.errors.HfHubHTTPError):
    """What the hub answers to who may not read a data set."""

    def __init__(self) -> None:
        Exception.__init__(self, "gated")


@pytest.mark.parametrize(("answer", "offline"), [(Refused(), False), (TimeoutError("no answer"), True)])
def test_only_a_hub_that_is_not_there_sends_to_the_cache(
    answer: Exception, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_answers.cache_clear()

    def asked(*_: object, **__: object) -> None:
        raise answer

    def loaded(*_: object, **__: object) -> None:
        raise ConnectionError(f"offline is {datasets.config.HF_HUB_OFFLINE}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    with pytest.raises(InputError, match=rf"offline is {offline}.*task\.path="):
        load(WHAT, None)
    assert not datasets.config.HF_HUB_OFFLINE, "put back"


HALF = r'{"question": "1+1? \ud83d", "answer": "2"}'
GOOD = r'{"question": "1+1? \ud83d\ude00", "answer": "2"}'


def test_half_of_a_character_is_refused_with_file_and_line(tmp_path: Path) -> None:
    lines, listed = tmp_path / "train.jsonl", tmp_path / "train.json"
    lines.write_text(f"{GOOD}\n{HALF}\n")
    listed.write_text(f"[{GOOD}, {HALF}]")
    for path, where in ((lines, "line 2"), (listed, "row 2")):
        with pytest.raises(InputError, match=rf"task\.path={path} can't be read: .*{where}: .*half of a"):
            load(WHAT, str(path))
    lines.write_text(f"{GOOD}\n")
    assert load(WHAT, str(lines)) == [{"question": "1+1? \U0001f600", "answer": "2"}]
    with pytest.raises(InputError, match="half of a surrogate pair"):
        small_policy().encode("1\ud83d")
    (tmp_path / "prompt.json").write_text(r'[{"role": "user", "content": "{question} \ud83d"}]')
    with pytest.raises(InputError, match="half of a surrogate pair"):
        PromptFile(str(tmp_path / "prompt.json"), ("question",))


@pytest.mark.parametrize("name", ["gsm8k", "math500", "humaneval"])
def test_a_path_that_does_not_exist_is_named_and_not_the_hub(name: str, tmp_path: Path) -> None:
    lines = [f"task={name}", f"task.path={tmp_path}/none"]
    with pytest.raises(
        config.ConfigError, match=rf"task\.path={tmp_path}/none: this file or folder does not exist"
    ):
        config.preflight("config", lines)
    task = config.build(config.compose("config", lines).task)
    with pytest.raises(InputError, match=rf"task\.path={tmp_path}/none is neither a file nor a folder"):
        task.examples("train")
    config.preflight("config", ["task=countdown", "task.train_path=hub"])
    with pytest.raises(config.ConfigError, match=r"task\.train_path=hut: .* or task\.train_path=hub"):
        config.preflight("config", ["task=countdown", "task.train_path=hut"])
