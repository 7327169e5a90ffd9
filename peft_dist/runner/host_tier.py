"""Adapters that were read and checked, kept in host memory as far as a budget goes."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft_dist.core.adapter import AdapterSpec
from peft_dist.runner.adapter_tensors import LoadedAdapter


class HostTier:
    """Host copies by content hash; the least recently used ones that nobody copies from leave first.

    For several threads. Beyond ``capacity`` bytes there is only what is in use at the moment, and what ``keep`` was
    called for; an adapter that is larger is not kept otherwise.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._copies: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._kept: dict[str, LoadedAdapter] = {}

    @property
    def num_bytes(self) -> int:
        """Of what counts against the capacity."""
        with self._lock:
            return self._num_bytes()

    @property
    def specs(self) -> list[AdapterSpec]:
        """Of the adapters that have a copy, least recently used first, those that are kept beyond the capacity last."""
        with self._lock:
            kept = [adapter.spec for key, adapter in self._kept.items() if key not in self._copies]
            return [adapter.spec for adapter in self._copies.values()] + kept

    @contextmanager
    def hold(self, spec: AdapterSpec, read: Callable[[], LoadedAdapter]) -> Iterator[LoadedAdapter]:
        """The adapter's copy, made by ``read`` (which may raise) if there is none; it stays at least meanwhile."""
        key = spec.content_hash
        with self._lock:
            self._in_use[key] += 1
            adapter = self._copies.get(key, self._kept.get(key))
            if adapter is None:
                self.misses += 1
                if spec.num_bytes <= self.capacity:
                    self._trim(self.capacity - spec.num_bytes)
            else:
                self.hits += 1
                if key in self._copies:
                    self._copies.move_to_end(key)
        try:
            if adapter is None:
                adapter = read()
                if spec.num_bytes <= self.capacity:
                    with self._lock:
                        adapter = self._copies.setdefault(key, adapter)
            yield adapter
        finally:
            with self._lock:
                self._in_use[key] -= 1
                if not self._in_use[key]:
                    del self._in_use[key]
                self._trim(self.capacity)

    def keep(self, content_hash: str, adapter: LoadedAdapter | None = None) -> bool:
        """Keep the copy there is, or else ``adapter``, until ``release``, beyond the capacity; whether there is one."""
        with self._lock:
            adapter = self._copies.get(content_hash, self._kept.get(content_hash, adapter))
            if adapter is not None:
                self._kept[content_hash] = adapter
            return adapter is not None

    def release(self, content_hash: str) -> None:
        """End what ``keep`` began."""
        with self._lock:
            self._kept.pop(content_hash, None)

    def remove(self, content_hash: str) -> None:
        """Give up a copy; who is copying from it can finish."""
        with self._lock:
            self._copies.pop(content_hash, None)
            self._kept.pop(content_hash, None)

    def _num_bytes(self) -> int:
        return sum(adapter.spec.num_bytes for adapter in self._copies.values())

    def _trim(self, target: int) -> None:
        excess = self._num_bytes() - target
        for key in [key for key in self._copies if not self._in_use[key]]:
            if excess <= 0:
                return
            excess -= self._copies.pop(key).spec.num_bytes
