"""The garbage collector passes over what was there before."""

from __future__ import annotations

import gc
import weakref

import pytest

from peft_dist.core.collector import frozen_heap


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def nothing_frozen():
    gc.unfreeze()
    yield
    gc.unfreeze()


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


def test_the_heap_thaws_after_an_error():
    with pytest.raises(KeyError), frozen_heap():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen():
    gc.freeze()
    with frozen_heap():
        pass
    assert gc.get_freeze_count() > 0
