"""What the executor says of seconds: measured on the device where the host has only queued the work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult
from peft_dist.runner.executor import TorchExecutor

SPEC = AdapterSpec("a", "hash", "", {"m": 4}, 10)


class FakeClock:
    """A device's time in milliseconds, and events that take it down when they are recorded."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits = 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: setattr(self, "waits", self.waits + 1)
        event.elapsed_time = lambda other: other.at - event.at
        return event


class FakeMerging:
    """Each merge takes 30 ms of the device."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.current: str | None = None
        self.held: set[str | None] = set()

    def holds(self, content_hash: str | None) -> bool:
        return content_hash in self.held

    def switch(self, content_hash: str | None, weights: object = None) -> None:
        self.clock.now += 30.0
        if content_hash == "bad":
            raise MemoryError("no room")
        self.current = content_hash


class FakeRunner:
    """Each step takes 8 ms of the device."""

    device = torch.device("cuda")
    kv = graphs = None

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.captured: set[int] = set()
        self.merge = FakeMerging(clock)
        self.store = SimpleNamespace(
            pool=SimpleNamespace(device=torch.device("cpu")), weights_in=lambda slot: {}, remove=lambda key: None
        )

    def start(self, batch: Batch) -> Any:
        self.clock.now += 8.0
        return SimpleNamespace(number=batch.step, was_captured=batch.step in self.captured)

    def finish(self, step: Any) -> StepResult:
        return StepResult(step.number, [])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    return clock


@pytest.fixture
def executor(clock: FakeClock) -> Any:
    runner: Any = FakeRunner(clock)
    made = TorchExecutor(runner)
    made._slots = {"hash": 0, "bad": 1}
    yield made
    made.close()


def test_a_switch_is_told_with_the_step_after_it(executor: TorchExecutor, clock: FakeClock) -> None:
    first = executor.submit(Batch(0, []))
    assert executor.switch(SPEC) is None
    clock.now += 5.0
    second = executor.submit(Batch(1, []))
    third = executor.submit(Batch(2, []))
    assert clock.waits == 0, "nobody waits before a result is asked for"
    results = [executor.collect(handle) for handle in (first, second, third)]
    assert [result.switch_seconds for result in results] == [None, pytest.approx(0.030), None]
    assert [result.seconds for result in results] == [pytest.approx(0.008)] * 3


def test_a_step_that_waited_for_its_capture_tells_no_seconds_and_still_the_switch_before_it(
    executor: TorchExecutor,
) -> None:
    runner: Any = executor.runner
    runner.captured = {0}
    executor.switch(SPEC)
    first, second = executor.submit(Batch(0, [])), executor.submit(Batch(1, []))
    results = [executor.collect(handle) for handle in (first, second)]
    assert [result.seconds for result in results] == [None, pytest.approx(0.008)]
    assert [result.switch_seconds for result in results] == [pytest.approx(0.030), None]


def test_a_switch_that_failed_or_was_cleared_is_nobodys(executor: TorchExecutor) -> None:
    with pytest.raises(MemoryError):
        executor.switch(AdapterSpec("bad", "bad", "", {"m": 4}, 10))
    assert executor.collect(executor.submit(Batch(0, []))).switch_seconds is None
    executor._slots.clear()
    assert executor.switch(None) is None
    executor.clear()
    assert executor.collect(executor.submit(Batch(1, []))).switch_seconds is None


def test_a_switch_that_costs_nothing_puts_nothing_on_the_device(
    executor: TorchExecutor, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge: Any = executor.runner.merge
    assert executor.switch(SPEC) is None
    merge.held = {None, "hash"}
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "Event", None)
        for spec in (None, SPEC, None):
            seconds = executor.switch(spec)
            assert seconds is not None and 0 <= seconds < 60
            assert merge.current == (spec.content_hash if spec else None)
    # Those of the merge before were told by nobody: no step came between.
    assert executor.collect(executor.submit(Batch(0, []))).switch_seconds is None


def test_on_a_cpu_the_caller_was_kept_waiting(clock: FakeClock) -> None:
    runner: Any = FakeRunner(clock)
    runner.device = torch.device("cpu")
    executor = TorchExecutor(runner)
    executor._slots = {"hash": 0}
    seconds = executor.switch(SPEC)
    assert seconds is not None and seconds >= 0
    assert executor.collect(executor.submit(Batch(0, []))).switch_seconds is None
    executor.close()


def test_copies_of_kv_blocks_are_timed_apart_from_the_step(executor: TorchExecutor, clock: FakeClock) -> None:
    def copy_blocks(batch: Batch) -> int:
        clock.now += 12.0
        return 4096 * (len(batch.swap_outs) + len(batch.swap_ins))

    runner: Any = executor.runner
    runner.copy_blocks = copy_blocks
    executor.switch(SPEC)
    with_copies = executor.submit(Batch(0, [], swap_outs=[(0, 0), (1, 1)], swap_ins=[(2, 2)]))
    without = executor.submit(Batch(1, []))
    assert clock.waits == 0
    first, second = executor.collect(with_copies), executor.collect(without)
    assert (first.swap_bytes, first.swap_seconds) == (3 * 4096, pytest.approx(0.012))
    assert (first.seconds, first.switch_seconds) == (pytest.approx(0.008), pytest.approx(0.030))
    assert (second.swap_bytes, second.swap_seconds) == (0, None)
