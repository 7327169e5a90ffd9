"""The engine's executor on torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult
from peft_dist.core.messages import AdapterResidency
from peft_dist.engine.executor import LoadOutcome
from peft_dist.runner.adapter_loader import AdapterLoader
from peft_dist.runner.model_runner import ModelRunner, PendingStep

logger = logging.getLogger(__name__)


class Submitted(NamedTuple):
    """A step under way, and what measures it: the seconds of ``start`` on a CPU, two events on a GPU."""

    step: PendingStep
    seconds: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None


class TorchExecutor:
    """Runs batches through a ``ModelRunner``; on a GPU the work is queued in order and ``submit`` returns early."""

    def __init__(self, runner: ModelRunner, load_timeout: float | None = None) -> None:
        """``load_timeout``: Seconds for reading one adapter; None is no limit."""
        self.runner = runner
        self._loader = AdapterLoader(runner.store, load_timeout)
        self._slots: dict[str, int] = {}
        self._mergeable: dict[str, bool] = {}

    def submit(self, batch: Batch) -> Submitted:
        if self.runner.device.type != "cuda":
            began = time.perf_counter()
            step = self.runner.start(batch)
            return Submitted(step, time.perf_counter() - began, None)
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
        step = self.runner.start(batch)
        events[1].record()
        return Submitted(step, 0.0, events)

    def collect(self, handle: Submitted) -> StepResult:
        began = time.perf_counter()
        result = self.runner.finish(handle.step)
        if handle.events is None:
            seconds = handle.seconds + time.perf_counter() - began
        else:
            handle.events[1].synchronize()
            seconds = handle.events[0].elapsed_time(handle.events[1]) / 1e3
        return msgspec.structs.replace(result, seconds=seconds)

    def can_merge(self, spec: AdapterSpec) -> bool:
        merge, key = self.runner.merge, spec.content_hash
        if merge is None:
            return False
        if key not in self._mergeable:
            # Asked at every step; what can be merged depends on the adapter's modules alone.
            reason = merge.mergeable(spec.ranks.keys())
            self._mergeable[key] = reason is None
            if reason is not None:
                logger.warning("adapter %r runs unmerged: %s", spec.name, reason)
        return self._mergeable[key]

    def switch(self, spec: AdapterSpec | None) -> float:
        merge = self.runner.merge
        assert merge is not None, "nothing is mergeable, so nobody asks"
        began = time.perf_counter()
        if spec is None:
            merge.switch(None)
        else:
            weights = self.runner.store.weights_in(self._slots[spec.content_hash])
            merge.switch(spec.content_hash, weights)
        return time.perf_counter() - began

    def merged_adapter(self) -> str | None:
        return self.runner.merge.current if self.runner.merge is not None else None

    def held_adapter(self) -> str | None:
        return self.runner.merge.held if self.runner.merge is not None else None

    def residency(self) -> list[AdapterResidency]:
        store = self.runner.store
        on_host = {spec.content_hash for spec in store.host.specs}
        found = []
        for spec in store.specs:
            key = spec.content_hash
            tier = "device" if key in self._slots else "host" if key in on_host else "disk"
            found.append(AdapterResidency(key, tier, spec.max_rank, spec.num_bytes))
        return found

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.runner.forget(request_id)

    def start_load(self, spec: AdapterSpec, slot: int) -> None:
        self._loader.start(spec, slot)

    def take_loaded(self) -> list[LoadOutcome]:
        outcomes = self._loader.take()
        self._slots.update({outcome.content_hash: outcome.slot for outcome in outcomes if outcome.error is None})
        return outcomes

    def fileno(self) -> int:
        return self._loader.fileno()

    def drop_adapter(self, slot: int) -> None:
        self.runner.store.pool.drop(slot)
        self._slots = {key: held for key, held in self._slots.items() if held != slot}

    def discard_adapter(self, content_hash: str) -> None:
        self.runner.store.remove(content_hash)
        self._mergeable.pop(content_hash, None)

    def clear(self) -> None:
        """Bring the base weights back and empty every slot. No batch and no load may be under way."""
        if self.runner.merge is not None:
            self.runner.merge.switch(None)
        for slot in self._slots.values():
            self.runner.store.pool.drop(slot)
        self._slots.clear()

    def close(self) -> None:
        """End the threads of the loader; the loads under way are not told of."""
        self._loader.close()
