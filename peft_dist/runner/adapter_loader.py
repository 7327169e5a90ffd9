"""The way of an adapter from disk or host into its slot, on threads that no step waits for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError
from peft_dist.engine.executor import LoadOutcome
from peft_dist.kernels.lora_fill import rehearse_fill
from peft_dist.kernels.lora_pool import Reservation
from peft_dist.kernels.transfer import warm_up_pinned
from peft_dist.runner.adapter_store import AdapterStore
from peft_dist.runner.adapter_tensors import LoadedAdapter
from peft_dist.runner.background import BackgroundCalls, Call, Ended, TimeLimitError

# One reads while the other copies.
NUM_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Load:
    spec: AdapterSpec
    reservation: Reservation


class AdapterLoader:
    """Loads into pages that are reserved before and published after; belongs to the engine's thread."""

    def __init__(self, store: AdapterStore, time_limit: float | None) -> None:
        """``time_limit``: Seconds for reading one adapter; None is no limit."""
        self._store = store
        self._time_limit = time_limit
        self._calls: BackgroundCalls[_Load, float] = BackgroundCalls("adapter-loader", NUM_THREADS, time_limit)
        is_cuda = store.pool.device.type == "cuda"
        self._stream = torch.cuda.Stream(store.pool.device) if is_cuda else None
        if is_cuda:
            rehearse_fill(torch.empty(0, dtype=store.pool.dtype, device=store.pool.device))
            warm_up_pinned(store.pool.device)

    def fileno(self) -> int:
        """Readable while ``take`` has something."""
        return self._calls.fileno()

    def start(self, spec: AdapterSpec, slot: int) -> None:
        """Begin to load a registered adapter into an empty slot."""
        reservation = self._store.pool.reserve(slot, self._store.ranks(spec))
        before = None
        if self._stream is not None:
            # Batches in flight may still read these pages for the adapter that had them before.
            before = torch.cuda.Event()
            before.record(torch.cuda.current_stream(self._store.pool.device))
        # Taken now: the registration may change while the thread reads.
        read = partial(self._store.read, spec, self._store.sources(spec))
        self._calls.start(_Load(spec, reservation), partial(self._load, spec, reservation, read, before))

    def take(self) -> list[LoadOutcome]:
        """Publish what has been loaded, give back what has not, and tell of both."""
        return [self._settle(ended) for ended in self._calls.take()]

    def close(self) -> None:
        self._calls.close()

    def _load(
        self,
        spec: AdapterSpec,
        reservation: Reservation,
        read: partial[LoadedAdapter],
        before: torch.cuda.Event | None,
        call: Call,
    ) -> float:
        """Seconds of the copy from the host's memory into the pages."""

        def read_in_time() -> LoadedAdapter:
            adapter = read()
            # The copy may be kept, and the pages written, only while somebody waits for them.
            call.commit()
            return adapter

        if self._stream is not None:
            # Of this thread, which locks memory for the device: for another one CUDA would set up a context there.
            torch.cuda.set_device(self._stream.device)
        with self._store.host.hold(spec, read_in_time) as adapter:
            call.commit()
            if self._stream is None or before is None:
                began = time.perf_counter()
                self._fill(reservation, adapter)
                return time.perf_counter() - began
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(before)
                began_there = torch.cuda.Event(enable_timing=True)
                began_there.record(self._stream)
                self._fill(reservation, adapter)
                after = torch.cuda.Event(enable_timing=True, blocking=True)
                after.record(self._stream)
            # This thread waits, not the engine's: what is published is there.
            after.synchronize()
            return began_there.elapsed_time(after) / 1e3

    def _fill(self, reservation: Reservation, adapter: LoadedAdapter) -> None:
        dtype = self._store.pool.dtype
        # Its file was checked; only a type of narrower range can make an infinity of a finite number.
        finite = all(
            torch.finfo(each).max <= torch.finfo(dtype).max for each in {w.B.dtype for w in adapter.weights.values()}
        )
        self._store.pool.fill(reservation, self._store.layer_tensors(adapter), finite=finite)

    def _settle(self, ended: Ended[_Load, float]) -> LoadOutcome:
        load = ended.key
        if ended.error is None:
            self._store.pool.publish(load.reservation)
        else:
            self._store.pool.cancel(load.reservation)
        slot, problem = load.reservation.slot, self._describe(load, ended)
        return LoadOutcome(load.spec.content_hash, slot, problem, ended.seconds, ended.result)

    def _describe(self, load: _Load, ended: Ended[_Load, float]) -> str | None:
        spec, error = load.spec, ended.error
        if error is None or isinstance(error, AdapterError):
            return None if error is None else str(error)
        if isinstance(error, TimeLimitError):
            return (
                f"adapter {spec.name!r} in {spec.path} was not read within {self._time_limit:g} s: see to its disk, or "
                "raise adapter_load_timeout (--adapter-load-timeout)"
            )
        return f"adapter {spec.name!r} in {spec.path}: {type(error).__name__}: {error}"
