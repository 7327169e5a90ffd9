"""What a capture that fails leaves behind: a device on which the next one succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from peft_dist.kernels.capture import CudaCapture

DEVICE = torch.device("cuda", 0)


class Stream:
    """Notes who waits for it."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device, self.capturing = DEVICE, False
        self.waits: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)
        # Work behind a capture's is captured.
        self.capturing |= other.capturing


class Driver:
    """torch.cuda without a device: streams, and captures that fail at their end where a fork was left open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.usual = Stream()
        self.pools = 0
        self.synchronized: list[torch.device] = []
        self.instantiate_error: str | None = None
        self.forks: list[Stream] = []
        names: dict[str, Any] = {
            "Stream": Stream,
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self.stream,
            "synchronize": self.synchronized.append,
            "graph_pool_handle": self.new_pool,
            "CUDAGraph": Graph,
            "graph": self.graph,
            "is_current_stream_capturing": lambda: self.current.capturing,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: None,
        }
        for name, found in names.items():
            monkeypatch.setattr(torch.cuda, name, found)

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        graph.pool = pool
        before, self.current = self.current, stream
        stream.capturing = True
        stream.waits.clear()
        try:
            yield
        finally:
            # As torch does it: the stream stays the current one if the end fails.
            is_open = any(fork.capturing and fork not in stream.waits for fork in self.forks)
            for each in (stream, *self.forks):
                each.capturing = False
            if is_open:
                raise RuntimeError("capturing stream has unjoined work")
            if self.instantiate_error is not None:
                raise RuntimeError(self.instantiate_error)
            self.current = before


class Graph:
    pool = 0

    def replay(self) -> None:
        raise NotImplementedError


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_forks_that_an_error_left_open_are_joined(driver: Driver) -> None:
    beside: Any = Stream()
    driver.forks.append(beside)
    capture: Any = CudaCapture(DEVICE, [beside])

    def full() -> None:
        beside.wait_stream(driver.current)
        if driver.current.capturing:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        capture(full)
    assert driver.current is driver.usual and driver.synchronized == [DEVICE]


def test_memory_that_the_driver_lacks_is_memory(driver: Driver) -> None:
    capture = CudaCapture(DEVICE)
    driver.instantiate_error = "CUDA error: out of memory"
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error: out of memory"):
        capture(lambda: None)
    assert driver.current is driver.usual, "the stream of the capture would be everybody's"
    driver.instantiate_error = "CUDA error: operation not permitted when stream is capturing"
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        capture(lambda: None)
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_graphs_share_a_pool_as_long_as_there_is_one(driver: Driver) -> None:
    """A pool that no graph has any more cannot be used again."""
    capture = CudaCapture(DEVICE)

    def full() -> None:
        raise torch.OutOfMemoryError("no memory")

    def pool(replay: Any) -> int:
        found: int = replay.__self__.pool
        return found

    with pytest.raises(torch.OutOfMemoryError):
        capture(full)
    first, second = capture(lambda: None), capture(lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        capture(full)
    assert pool(first) == pool(second) == pool(capture(lambda: None))
    before = pool(first)
    del first, second
    assert pool(capture(lambda: None)) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("in_capture", [False, True])
def test_after_too_little_memory_more_is_captured(in_capture: bool) -> None:
    beside = torch.cuda.Stream()
    capture = CudaCapture(DEVICE, [beside])
    x = torch.ones(1 << 20, device=DEVICE)
    sums: list[torch.Tensor] = []

    def forked(too_much: bool) -> None:
        current = torch.cuda.current_stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            doubled = 2 * x
        if too_much and torch.cuda.is_current_stream_capturing() == in_capture:
            torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
        current.wait_stream(beside)
        sums[:] = [doubled.sum()]

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            capture(lambda: forked(True))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        replay = capture(lambda: forked(False))
        for value in (3.0, 5.0):
            x.fill_(value)
            replay()
            assert sums[0].item() == 2 * value * x.numel()
