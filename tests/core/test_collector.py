"""The garbage collector passes over what was there before."""

from __future__ import annotations

import gc
import weakref

import pytest

from peft_dist.core.collector import COLLECT_AFTER, freeze_heap, frozen_heap, rare_collections


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def nothing_frozen():
    before = gc.get_threshold()
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_old_objects_are_passed_over_and_new_ones_collected():
    old = Cycle()
    of_old = weakref.ref(old)
    with frozen_heap():
        del old
        new = Cycle()
        of_new = weakref.ref(new)
        del new
        gc.collect()
        assert of_new() is None
        assert of_old() is not None
    gc.collect()
    assert of_old() is None
    assert gc.get_freeze_count() == 0


def full_collections(count: int) -> int:
    """How many there are while so many objects come, and stay."""
    before = gc.get_stats()[2]["collections"]
    kept = [[i] for i in range(count)]
    assert len(kept) == count
    return gc.get_stats()[2]["collections"] - before


def test_full_collections_are_seldom_once_the_heap_is_frozen():
    with frozen_heap():
        assert not full_collections(200_000)
    gc.freeze()
    assert full_collections(200_000)
    gc.unfreeze()
    freeze_heap()
    assert not full_collections(200_000)


def test_the_heap_thaws_after_an_error():
    with pytest.raises(KeyError), frozen_heap():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen():
    gc.freeze()
    with frozen_heap():
        pass
    assert gc.get_freeze_count() > 0


def test_thresholds_come_back_with_the_heap():
    before = gc.get_threshold()
    with pytest.raises(KeyError), rare_collections():
        assert gc.get_threshold() == COLLECT_AFTER and gc.get_freeze_count()
        raise KeyError
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
