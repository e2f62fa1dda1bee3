"""What makes two runs the same run."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from spg.config import renames
from spg.runs.identity import identity


def test_a_setting_that_older_runs_lack_counts_only_if_it_is_not_their_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(renames.ADDED, "decoding.fresh", "None")
    older = OmegaConf.create({"decoding": {"steps": 4}})
    default = OmegaConf.create({"decoding": {"steps": 4, "fresh": None}})
    other = OmegaConf.create({"decoding": {"steps": 4, "fresh": 0.9}})
    assert identity(older) == identity(default) != identity(other)
