"""The tests here need the pretended device; without it they are skipped, and say why."""

from __future__ import annotations

import pytest

from tests.fake import build


@pytest.fixture(autouse=True)
def _device() -> None:
    if build.missing is not None:
        pytest.skip(build.missing)
