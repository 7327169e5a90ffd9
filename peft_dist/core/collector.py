"""Python's cyclic garbage collector, kept from looking through what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_AFTER = (20_000, 10, 10)
"""Objects more than were freed, young collections, and middle ones, until the collector looks at the next generation:
for who keeps very many objects that are no garbage."""
# Middle collections between two full ones: Python's 10 mean one for every quarter that the heap has grown.
_SELDOM = 1000


def freeze_heap() -> None:
    """For good: what is there now, without what is garbage already, lives as long as this process.

    And full collections are seldom from now on, one for some million objects more: a host copy of an adapter is a
    thousand, a hundred of them are walked over in 0.07 s, and meanwhile nobody else runs. What is young goes as before.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _SELDOM)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Have the collector look as seldom as by ``COLLECT_AFTER``, and not at what is there now, until the block ends."""
    with frozen_heap(), _thresholds(*COLLECT_AFTER):
        yield


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Have the collector pass over all that is there now, until the block ends.

    A full collection walks over the model's and its libraries' objects, some million: 0.25 to 0.35 s in which no step
    is begun, and it comes whenever some dozen adapters or some hundred requests have come and gone. Only what is made
    meanwhile is looked through, and seldom. Where somebody has frozen objects already, as a server does, nothing is
    changed: to thaw them is not ours.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        with _thresholds(*gc.get_threshold()[:2], _SELDOM):
            yield
    finally:
        gc.unfreeze()


@contextmanager
def _thresholds(*values: int) -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*values)
    try:
        yield
    finally:
        gc.set_threshold(*before)
