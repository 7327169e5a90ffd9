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
from peft_dist.core.handover import KVHandle
from peft_dist.core.messages import AdapterResidency
from peft_dist.engine.executor import LoadOutcome, TransferOutcome
from peft_dist.kernels.capture import NotCapturableError
from peft_dist.runner.adapter_loader import AdapterLoader
from peft_dist.runner.device_health import check_device, peak_memory_bytes
from peft_dist.runner.kv_transfers import KVTransfers
from peft_dist.runner.memory import noting_memory
from peft_dist.runner.merged_ratio import host_limit
from peft_dist.runner.model_runner import ModelRunner, PendingStep
from peft_dist.runner.step_graphs import StepGraphs

logger = logging.getLogger(__name__)


class DeviceSpan:
    """Around work that is queued on a GPU's current stream: how long that takes there."""

    def __init__(self) -> None:
        self._first = torch.cuda.Event(enable_timing=True)
        self._last = torch.cuda.Event(enable_timing=True)

    def __enter__(self) -> DeviceSpan:
        self._first.record()
        return self

    def __exit__(self, *_: object) -> None:
        self._last.record()

    def seconds(self) -> float:
        """Waits until the work is done."""
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1e3


class Swap(NamedTuple):
    """KV blocks on their way between device and host."""

    num_bytes: int
    seconds: float
    span: DeviceSpan | None


class Submitted(NamedTuple):
    """A step under way, and what measures it: the seconds of ``start`` on a CPU, a span on a GPU.

    ``switch`` is around the change of weights that was queued before it, ``swap`` around the copies of KV blocks.
    """

    step: PendingStep
    seconds: float
    span: DeviceSpan | None
    switch: DeviceSpan | None
    swap: Swap | None


class TorchExecutor:
    """Runs batches through a ``ModelRunner``; on a GPU the work is queued in order and ``submit`` returns early."""

    def __init__(self, runner: ModelRunner, load_timeout: float | None = None) -> None:
        """``load_timeout``: Seconds for reading one adapter; None is no limit."""
        self.runner = runner
        self._loader = AdapterLoader(runner.store, load_timeout)
        self.transfers = KVTransfers(runner.kv)
        self._slots: dict[str, int] = {}
        self._mergeable: dict[str, bool] = {}
        self._switch: DeviceSpan | None = None

    def submit(self, batch: Batch) -> Submitted:
        swap = self._copy_blocks(batch)
        if self.runner.device.type != "cuda":
            began = time.perf_counter()
            step = self.runner.start(batch)
            return Submitted(step, time.perf_counter() - began, None, None, swap)
        switch, self._switch = self._switch, None
        with DeviceSpan() as span:
            step = self.runner.start(batch)
        return Submitted(step, 0.0, span, switch, swap)

    def collect(self, handle: Submitted) -> StepResult:
        began = time.perf_counter()
        result = self.runner.finish(handle.step)
        seconds: float | None
        if handle.step.was_captured:
            seconds = None
        elif handle.span is None:
            seconds = handle.seconds + time.perf_counter() - began
        else:
            seconds = handle.span.seconds()
        switch_seconds = handle.switch.seconds() if handle.switch is not None else None
        result = msgspec.structs.replace(result, seconds=seconds, switch_seconds=switch_seconds)
        if handle.swap is None:
            return result
        swap = handle.swap
        swap_seconds = swap.seconds if swap.span is None else swap.span.seconds()
        return msgspec.structs.replace(result, swap_bytes=swap.num_bytes, swap_seconds=swap_seconds)

    def _copy_blocks(self, batch: Batch) -> Swap | None:
        if not batch.swap_outs and not batch.swap_ins:
            return None
        if self.runner.device.type != "cuda":
            began = time.perf_counter()
            num_bytes = self.runner.copy_blocks(batch)
            return Swap(num_bytes, time.perf_counter() - began, None)
        with DeviceSpan() as span:
            num_bytes = self.runner.copy_blocks(batch)
        return Swap(num_bytes, 0.0, span)

    def register(self, spec: AdapterSpec, *, allow_pickle: bool) -> None:
        """Ready the model for an adapter that was inspected, and remember where it is."""
        before = self.captured_for
        self.runner.store.register(spec, allow_pickle=allow_pickle)
        self.runner.store.pool.workspace.admit(spec.max_rank)
        if self.runner.graphs is not None and self.captured_for != before:
            self.runner.graphs.clear()

    @property
    def captured_for(self) -> tuple[int, int, int]:
        """What captured steps with adapters take for granted."""
        workspace = self.runner.store.pool.workspace
        return self.runner.store.num_layers, workspace.max_rank, workspace.ranks

    def capture(self, *, progress: bool = False) -> None:
        """Where steps are captured, make those that the adapters registered so far need."""
        if self.runner.graphs is None:
            return
        try:
            with noting_memory(self.runner.device, "captured steps"):
                self.runner.graphs.capture(lora=bool(self.runner.store.registered), progress=progress)
        except NotCapturableError as error:
            logger.warning("steps are not captured as CUDA graphs but run operator by operator: %s", error)
            self.runner.graphs = None

    def capture_some(self) -> bool:
        """A step that the registered adapters need; False: there is none left to capture. For when there is no work."""
        graphs = self.runner.graphs
        return graphs is not None and self.lacks_captures and self._capture_next(graphs)

    @property
    def lacks_captures(self) -> bool:
        """Whether ``capture_some`` has something to do."""
        graphs = self.runner.graphs
        return graphs is not None and bool(self.runner.store.registered) and graphs.lacks_steps

    def _capture_next(self, graphs: StepGraphs) -> bool:
        graphs.capture_next()
        return not graphs.gives_up

    def rehearse(self, lengths: Sequence[int], tile_rows: int, *, corrected: bool = False) -> None:
        """As ``ModelRunner.rehearse``."""
        self.runner.rehearse(lengths, tile_rows, corrected=corrected)

    def prepare_merge(self, spec: AdapterSpec) -> str | None:
        """Settle whether an adapter can be merged, and take the memory for it; why it cannot, None when it can.

        To be called when it is registered: what was settled is answered by ``can_merge`` until it is discarded.
        """
        merge = self.runner.merge
        if merge is None:
            self._mergeable[spec.content_hash] = False
            return "nothing is merged here"
        reason = merge.reserve(spec.ranks.keys())
        self._mergeable[spec.content_hash] = reason is None
        if reason is not None:
            logger.warning("adapter %r cannot be merged: %s", spec.name, reason)
        elif not self._can_host(spec):
            logger.warning(
                "adapter %r: its part of a merged weight is up to %.3g times as large as the base's (%.3g are allowed "
                "in %s), so others may not join its merged batches, and its own requests run as ever: if that is not "
                "meant, correct lora_alpha or use an earlier checkpoint",
                spec.name,
                spec.merged_ratio,
                host_limit(self.runner.model.dtype),
                str(self.runner.model.dtype).removeprefix("torch."),
            )
        return reason

    def can_merge(self, spec: AdapterSpec) -> bool:
        if spec.content_hash not in self._mergeable:
            self.prepare_merge(spec)
        return self._mergeable[spec.content_hash]

    def can_host(self, spec: AdapterSpec) -> bool:
        return self.can_merge(spec) and self._can_host(spec)

    def _can_host(self, spec: AdapterSpec) -> bool:
        return spec.merged_ratio <= host_limit(self.runner.model.dtype)

    def switch(self, spec: AdapterSpec | None) -> float | None:
        merge, key = self.runner.merge, spec.content_hash if spec else None
        assert merge is not None, "nothing is mergeable, so nobody asks"
        self._switch = None
        is_held = merge.holds(key)
        weights = None if key is None or is_held else self.runner.store.weights_in(self._slots[key])
        # A flag of the host alone: events around it would cost more than the change.
        if is_held or self.runner.device.type != "cuda":
            began = time.perf_counter()
            merge.switch(key, weights)
            return time.perf_counter() - began
        with DeviceSpan() as span:
            merge.switch(key, weights)
        self._switch = span
        return None

    def merged_adapter(self) -> str | None:
        return self.runner.merge.current if self.runner.merge is not None else None

    def holds_merged(self, content_hash: str) -> bool:
        return self.runner.merge is not None and self.runner.merge.holds(content_hash)

    def residency(self) -> list[AdapterResidency]:
        store = self.runner.store
        on_host = {spec.content_hash for spec in store.host.specs}
        found = []
        for spec in store.specs:
            key = spec.content_hash
            tier = "device" if key in self._slots else "host" if key in on_host else "disk"
            found.append(AdapterResidency(key, tier, spec.max_rank, spec.num_bytes))
        return found

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.runner.device)

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.runner.forget(request_id)

    def start_load(self, spec: AdapterSpec, slot: int) -> None:
        self._loader.start(spec, slot)

    def take_loaded(self) -> list[LoadOutcome]:
        outcomes = self._loader.take()
        if any(outcome.error is not None for outcome in outcomes):
            self.check_device()
        self._slots.update({outcome.content_hash: outcome.slot for outcome in outcomes if outcome.error is None})
        return outcomes

    def fileno(self) -> int:
        return self._loader.fileno()

    def drop_adapter(self, slot: int) -> None:
        self.runner.store.pool.drop(slot)
        self._slots = {key: held for key, held in self._slots.items() if held != slot}

    def keep_adapter(self, content_hash: str) -> None:
        self.runner.store.keep(content_hash, self._slots.get(content_hash))

    def release_adapter(self, content_hash: str) -> None:
        self.runner.store.host.release(content_hash)

    def discard_adapter(self, content_hash: str) -> None:
        self.runner.store.remove(content_hash)
        self._mergeable.pop(content_hash, None)
        if self.runner.merge is not None:
            self.runner.merge.discard(content_hash)

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        self.transfers.start_export(key, blocks, on_host=on_host, ahead=ahead)

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        self.transfers.start_import(key, kv, blocks)

    def take_transfers(self) -> list[TransferOutcome]:
        outcomes = self.transfers.take()
        if any(outcome.error is not None for outcome in outcomes):
            self.check_device()
        return outcomes

    def end_export(self, key: int) -> None:
        self.transfers.end_export(key)

    def transfers_fileno(self) -> int:
        return self.transfers.fileno()

    def check_device(self) -> None:
        """Raises DeviceLostError when the device can do nothing more, so that no load or copy will ever succeed."""
        check_device(self.runner.device)

    def clear(self) -> None:
        """Bring the base weights back and empty every slot. No batch and no load may be under way."""
        if self.runner.merge is not None:
            self.runner.merge.switch(None)
        self._switch = None
        for slot in self._slots.values():
            self.runner.store.pool.drop(slot)
        self._slots.clear()

    def close(self) -> None:
        """End the threads of the loader, and drop captured steps; the loads under way are not told of."""
        self._loader.close()
        self.transfers.close()
        if self.runner.graphs is not None:
            self.runner.graphs.close()
