"""Where rows come from when the hub answers, refuses, or is not there."""

from __future__ import annotations

import datasets
import huggingface_hub
import pytest

from spg.core.errors import InputError
from spg.core.hub import hub_answers
from spg.tasks.datasets import Published, load

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
