"""Python's cyclic garbage collector, kept from looking through what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def freeze_heap() -> None:
    """For good: what is there now, without what is garbage already, lives as long as this process."""
    gc.collect()
    gc.freeze()


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Have the collector pass over all that is there now, until the block ends.

    A full collection walks over the model's and its libraries' objects, some million: 0.25 to 0.35 s in which no step
    is begun, and it comes whenever some dozen adapters or some hundred requests have come and gone. Only what is made
    meanwhile is looked through. Where somebody has frozen objects already, as a server does, nothing is changed: to
    thaw them is not ours.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
