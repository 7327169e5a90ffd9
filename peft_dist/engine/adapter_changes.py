"""Carries out what the adapter manager has decided."""

from __future__ import annotations

from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.executor import Executor


def apply_changes(adapters: AdapterManager, executor: Executor) -> int:
    """In order with the batches. Returns how many adapters are somewhere else now, loads that began aside."""
    num_moved = 0
    if not adapters.has_changes:
        return num_moved
    for content_hash in adapters.take_keeps():
        executor.keep_adapter(content_hash)
    for slot, spec in adapters.take_changes():
        if spec is None:
            executor.drop_adapter(slot)
            num_moved += 1
        else:
            executor.start_load(spec, slot)
    for content_hash in adapters.take_releases():
        executor.release_adapter(content_hash)
    for content_hash in adapters.take_discards():
        executor.discard_adapter(content_hash)
        num_moved += 1
    return num_moved
