"""Many completions scored at once."""

from __future__ import annotations

import time
from typing import Any

import pytest

from spg.core.errors import Interrupted
from spg.tasks.scoring import score_all


def test_several_are_scored_at_once_in_their_order() -> None:
    def slow(example: Any, text: str) -> str:
        time.sleep(0.05 if example["n"] % 2 else 0.1)
        return f"{example['n']}{text}"

    examples, texts = [{"n": n} for n in range(8)], list("abcdefgh")
    started = time.perf_counter()
    assert score_all(slow, examples, texts, 8) == [f"{n}{text}" for n, text in enumerate(texts)]
    assert time.perf_counter() - started < 0.5
    assert score_all(slow, examples[:2], texts[:2], 1) == ["0a", "1b"]

    def stopped(example: Any, text: str) -> str:
        raise Interrupted("now")

    with pytest.raises(Interrupted):
        score_all(stopped, examples, texts, 2)
