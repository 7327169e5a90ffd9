"""Searches in a process of their own."""

from __future__ import annotations

import asyncio
import sys

import pytest

from peft_dist.placement.placer import Search
from peft_dist.placement.placing import place
from peft_dist.placement.placing_process import SearchError, run_search
from tests.placement.test_placing import cluster

SEARCH = Search("dlora", cluster(3, [3.0, 1.0, 1.0], 4), {"a0": frozenset({0})}, 1.1)


def test_the_process_finds_what_the_search_does() -> None:
    assert asyncio.run(run_search(SEARCH)) == SEARCH.run()
    assert asyncio.run(run_search(Search("dlora", SEARCH.view))) == place(SEARCH.view)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (("/nowhere/python",), "cannot be started"),
        (
            (sys.executable, "-c", "import sys; sys.stdin.buffer.read(); sys.exit(3)"),
            "ended with status 3 and no place",
        ),
        (
            (sys.executable, "-c", "import sys; sys.stdin.buffer.read(); print('hm')"),
            "ended with status 0 and no place",
        ),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "no placement was found within 0.3 s"),
    ],
)
def test_a_process_that_fails_is_named(command: tuple[str, ...], error: str) -> None:
    with pytest.raises(SearchError, match=error):
        asyncio.run(run_search(SEARCH, timeout=0.3 if "time" in command[-1] else 30.0, command=command))
