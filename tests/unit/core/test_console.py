"""Log lines that a full disk does not take."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from spg.core.console import log_file, take_over_logging


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, whose handlers are given back."""
    logger = logging.getLogger()
    before = list(logger.handlers)
    yield logger
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
    logger.handlers[:] = before


def test_a_full_disk_leaves_lines_out_without_a_traceback(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    root.addHandler(logging.FileHandler("/dev/full"))
    take_over_logging()
    logging.getLogger("spg.test").warning("a line")
    for handler in root.handlers:
        handler.close()
    assert capsys.readouterr().err == ""


def test_a_log_file_goes_on_and_other_errors_show(
    root: logging.Logger, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    handler = logging.FileHandler(tmp_path / "train.log")
    handler.setFormatter(logging.Formatter("> %(message)s"))
    root.addHandler(handler)
    logging.getLogger("spg.test").warning("before")
    take_over_logging()
    logging.getLogger("spg.test").warning("after")
    assert (tmp_path / "train.log").read_text() == "> before\n> after\n"
    log_file(tmp_path / "other.log").handle(logging.makeLogRecord({"msg": "%d", "args": ("x",)}))
    assert "Logging error" in capsys.readouterr().err, "a mistake in a message is no full disk"
