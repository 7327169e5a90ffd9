"""Bars of libraries stay out of logs."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from peft_dist.worker.bars import quieten_bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def bars() -> Iterator[None]:
    """All are on, and are so again."""
    logging.enable_progress_bar()
    yield
    logging.enable_progress_bar()


def drawn() -> str:
    """What transformers writes while it loads something."""
    assert isinstance(sys.stderr, io.StringIO)
    list(logging.tqdm(range(3), desc="Loading weights"))
    return sys.stderr.getvalue()


def test_a_log_gets_none_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert "Loading weights" in drawn()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    quieten_bars()
    assert drawn() == ""
    assert not are_progress_bars_disabled()


def test_a_terminal_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    quieten_bars()
    assert "Loading weights" in drawn()


def test_downloads_stay_quiet_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    disable_progress_bars()
    try:
        quieten_bars()
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()
