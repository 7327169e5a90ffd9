"""Ranks behind rank 0: whose counting stands still is silent, and with it the replica."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from peft_dist.worker.rank_pulse import RankPulse, key


class Store:
    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()

    def add(self, name: str, amount: int, /) -> int:
        self.numbers[name] += amount
        return self.numbers[name]


def test_a_rank_that_stands_makes_the_replica_silent_until_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    now, store = [0.0], Store()
    pulse = RankPulse(store, 3, limit=2.0, clock=lambda: now[0])
    assert pulse.is_whole()
    for _ in range(5):  # Both count.
        now[0] += 1.0
        store.add(key(1), 1), store.add(key(2), 1)
        assert pulse.is_whole()
    found = []
    for _ in range(5):  # Rank 2 stands.
        now[0] += 1.0
        store.add(key(1), 1)
        found.append(pulse.is_whole())
    assert found == [True, True, False, False, False]
    store.add(key(2), 1)
    assert pulse.is_whole()
    words = [record.getMessage() for record in caplog.records]
    assert words == ["rank 2 gives no sign of life, so this replica gives none", "all ranks give signs of life again"]
