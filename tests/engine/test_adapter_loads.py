"""Loads that take a while: who can run goes on, who waits gets the right weights, and a failure stays with its own."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError
from peft_dist.core.messages import SequenceProgress
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.engine import Engine
from tests.engine.fake_executor import FakeExecutor
from tests.engine.test_engine import (
    ADAPTERS,
    arrivals,
    assert_empty,
    drain,
    expected,
    make_engine,
    make_request,
    step,
    tokens_of,
)

Progress = dict[str, list[SequenceProgress]]


def slow_engine(delay: int | Callable[[AdapterSpec], int], **options: object) -> Engine:
    engine = make_engine(**options)  # type: ignore[arg-type]
    executor_of(engine).load_delay = delay if callable(delay) else lambda spec: delay
    return engine


def executor_of(engine: Engine) -> FakeExecutor:
    executor = engine.executor
    assert isinstance(executor, FakeExecutor)
    return executor


def hash_of(adapter: int) -> str:
    spec = ADAPTERS[adapter]
    assert spec is not None
    return spec.content_hash


def pin(engine: Engine, name: str, adapter: int) -> None:
    """As a replica does when an adapter is registered; 0 unpins."""
    spec = ADAPTERS[adapter]
    if spec is None or spec.content_hash not in engine.adapters:
        engine.pin_adapter(name, None)
        return
    try:
        engine.scheduler.adapters.pins.check_pin(name, spec, engine.adapters.values())
    except AdapterError:
        return
    engine.pin_adapter(name, spec.content_hash)


def warm(engine: Engine, adapter: int) -> None:
    """Run a request so that the adapter is resident."""
    engine.add_request(make_request(f"warm {adapter}", [1], adapter, 1))
    drain(engine, {})


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(arrivals, min_size=1, max_size=12),
    aborts=st.dictionaries(st.integers(0, 11), st.integers(0, 30), max_size=4),
    forgets=st.dictionaries(st.integers(1, 4), st.integers(0, 30), max_size=2),
    pins=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4), st.sampled_from("pq")), max_size=4),
    prefetches=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=4),
    delays=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    depth=st.integers(0, 2),
    num_blocks=st.integers(16, 40),
    host=st.sampled_from([0, 7]),
    num_slots=st.integers(1, 4),
    num_rows=st.sampled_from([None, 4, 8, 12]),
)  # fmt: skip
def test_tokens_are_those_of_a_request_alone(
    requests, aborts, forgets, pins, prefetches, delays, depth, num_blocks, host, num_slots, num_rows
) -> None:
    engine = slow_engine(
        lambda spec: delays[int(spec.name[1:])], num_blocks=num_blocks, host=host, depth=depth, num_slots=num_slots
    )
    engine.scheduler.adapters = AdapterManager(num_slots, 4, num_rows)
    everyone = [
        (make_request(f"r{i}", prompt, adapter, count), arrival)
        for i, (prompt, adapter, count, arrival) in enumerate(requests)
    ]
    got: Progress = {}
    aborted: set[str] = set()
    forgotten: set[str] = set()
    for now in range(31):
        for request, arrival in everyone:
            if arrival == now and request.content_hash in forgotten:
                aborted.add(request.request_id)  # Refused at the door.
            elif arrival == now:
                engine.add_request(request)
        for index, when in aborts.items():
            if when == now and index < len(everyone) and everyone[index][0].request_id in engine.requests:
                aborted.add(everyone[index][0].request_id)
                engine.abort([everyone[index][0].request_id])
        for index, when in forgets.items():
            spec = ADAPTERS[index]
            if when == now and spec is not None:
                forgotten.add(spec.content_hash)
                engine.forget_adapter(spec.content_hash)
        for when, index, name in pins:
            if when == now:
                pin(engine, name, index)
        for when, index in prefetches:
            if when == now:
                engine.prefetch_adapter(hash_of(index))
        step(engine, got)
    drain(engine, got)
    for request, _ in everyone:
        tokens = tokens_of(got.get(request.request_id, []))
        whole = expected(request)
        assert tokens == (whole[: len(tokens)] if request.request_id in aborted else whole)
    assert_empty(engine)
    executor = executor_of(engine)
    pinned = {spec.content_hash for _, spec in engine.scheduler.adapters.pins.specs}
    assert pinned <= set(executor.slots.values()) and len(pinned) < max(num_slots, 2)
    assert sorted(executor.discarded) == sorted(forgotten)
    assert sorted(executor.slots.values()) == sorted(engine.scheduler.adapters.resident)
    assert not forgotten & set(executor.slots.values()) and not executor.loading


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_of_resident_adapters_go_on_during_a_load(depth: int) -> None:
    engine = slow_engine(lambda spec: 12 if spec.name == "a1" else 0, depth=depth)
    warm(engine, 1)
    requests = [
        make_request("slow", [5] * 6, 2, 4),
        make_request("resident", [4] * 9, 1, 4),
        make_request("base", [4] * 9, 0, 4),
    ]
    for request in requests:
        engine.add_request(request)
    got: Progress = {}
    for _ in range(9):
        step(engine, got)
    assert tokens_of(got["resident"]) == expected(requests[1])
    assert tokens_of(got["base"]) == expected(requests[2])
    assert "slow" not in got and engine.has_work
    drain(engine, got)
    assert tokens_of(got["slow"]) == expected(requests[0])
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_engine_tells_when_only_a_load_can_help(depth: int) -> None:
    engine = slow_engine(4, depth=depth)
    assert not engine.waits_for_load
    engine.add_request(make_request("r", [5] * 6, 2, 2))
    engine.add_request(make_request("base", [5] * 6, 0, 1))
    got: Progress = {}
    waited = 0
    for _ in range(20):
        step(engine, got)
        if engine.waits_for_load:
            waited += 1
            assert "base" in got and "r" not in got
    assert waited and not engine.has_work and not engine.waits_for_load


@pytest.mark.parametrize("depth", [0, 1])
def test_adapters_of_queued_requests_load_ahead_all_at_once(depth: int) -> None:
    engine = slow_engine(5, depth=depth, num_slots=3, max_seqs=1)
    for adapter in (1, 2, 3):
        engine.add_request(make_request(f"r{adapter}", [adapter] * 6, adapter, 8))
    got: Progress = {}
    step(engine, got)
    assert len(engine.scheduler.adapters.loading) == 3, "one runs at a time, but nobody waits for a load of his own"
    drain(engine, got)
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_load_fails_the_requests_of_its_adapter_alone(depth: int) -> None:
    engine = slow_engine(3, depth=depth)
    executor = executor_of(engine)
    spec = ADAPTERS[2]
    assert spec is not None
    executor.failing_loads[spec.content_hash] = "adapter 'a1' in /x: the file is gone"
    requests = [make_request(f"r{i}", [i + 1] * 6, adapter, 5) for i, adapter in enumerate((2, 1, 0, 2))]
    for request in requests:
        engine.add_request(request)
    got: Progress = {}
    drain(engine, got)
    for name in ("r0", "r3"):
        [last] = got[name]
        assert (
            last.finish_reason == "error"
            and last.error == "adapter 'a1' in /x: the file is gone"
            and last.lacks_adapter
        )
    for request in requests[1:3]:
        assert tokens_of(got[request.request_id]) == expected(request)
    assert engine.scheduler.adapters.load_failures == 1
    # The file is back: who comes now has it tried again.
    executor.failing_loads.clear()
    again = make_request("again", [7] * 6, 2, 5)
    engine.add_request(again)
    drain(engine, got)
    assert tokens_of(got["again"]) == expected(again)
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_during_a_load_leaves_nothing_behind(depth: int) -> None:
    engine = slow_engine(6, depth=depth)
    engine.add_request(make_request("r", [5] * 6, 2, 2))
    got: Progress = {}
    step(engine, got)
    engine.abort(["r"])
    assert engine.has_work, "the load is still to be taken"
    drain(engine, got)
    assert got == {} and len(engine.scheduler.adapters.resident) == 1
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_new_weights_under_an_old_name_share_nothing_with_running_requests(depth: int) -> None:
    engine = slow_engine(2, depth=depth)
    old, new = ADAPTERS[1], AdapterSpec("a0", "other weights", "", {"m": 4}, 10)
    assert old is not None
    got: Progress = {}
    prompt = list(range(1, 18))
    first, second = make_request("first", prompt, 1, 12), make_request("second", prompt, 1, 12)
    second.adapter = new
    engine.add_request(first)
    for _ in range(6):
        step(engine, got)
    engine.register_adapter(new)
    engine.add_request(second)
    engine.forget_adapter(old.content_hash)
    drain(engine, got)
    assert tokens_of(got["first"]) == expected(first) and tokens_of(got["second"]) == expected(second)
    assert got["second"][-1].num_cached_tokens == 0
    assert executor_of(engine).discarded == [old.content_hash]
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pinned_adapter_is_loaded_without_a_request_and_outstays_all_others(depth: int) -> None:
    engine = slow_engine(3, depth=depth, num_slots=2, max_adapter_wait=0.0)
    spec = ADAPTERS[1]
    assert spec is not None
    engine.register_adapter(spec, pinned=True)
    got: Progress = {}
    drain(engine, got)
    assert engine.scheduler.adapters.resident == [spec.content_hash]
    requests = [make_request(f"r{i}", [i + 1] * 6, 2 + i % 3, 5) for i in range(9)]
    for request in requests:
        engine.add_request(request)
    drain(engine, got)
    for request in requests:
        assert tokens_of(got[request.request_id]) == expected(request)
    executor = executor_of(engine)
    assert spec.content_hash in executor.slots.values() and engine.scheduler.adapters.evictions >= 2
    num_loads = executor.num_loads
    engine.add_request(make_request("pinned", [3] * 6, 1, 5))
    drain(engine, got)
    assert executor.num_loads == num_loads
    engine.forget_adapter(spec.content_hash)
    assert executor.discarded == [spec.content_hash] and not engine.scheduler.adapters.pins.specs
    assert_empty(engine)


def test_an_adapter_that_a_request_still_needs_counts_when_another_is_to_be_pinned() -> None:
    engine = slow_engine(0)
    engine.scheduler.adapters = AdapterManager(3, 4, 16)
    gone = AdapterSpec("gone", "gone", "", {"m": 16}, 10)
    engine.register_adapter(gone)
    request = make_request("r", [5] * 6)
    request.adapter = gone
    engine.add_request(request)
    engine.forget_adapter(gone.content_hash)
    with pytest.raises(AdapterError, match="'gone' has rank 16 in m"):
        engine.check_room(AdapterSpec("p", "p", "", {"m": 4}, 10), pinned=True)
    drain(engine, {})
    engine.check_room(AdapterSpec("p", "p", "", {"m": 4}, 10), pinned=True)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pin_that_finds_every_slot_under_way_is_met_once_one_has_arrived(depth: int) -> None:
    engine = slow_engine(4, depth=depth, num_slots=2)
    for adapter in (2, 3):
        engine.add_request(make_request(f"r{adapter}", [5] * 6, adapter, 2))
    got: Progress = {}
    step(engine, got)
    assert len(engine.scheduler.adapters.loading) == 2
    pin(engine, "p", 1)
    drain(engine, got)
    spec = ADAPTERS[1]
    assert spec is not None and engine.scheduler.adapters.is_resident(spec)
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_an_adapter_that_only_waiting_requests_use_stays_when_another_is_sent_ahead(depth: int) -> None:
    engine = slow_engine(0, depth=depth, num_slots=2, max_seqs=1)
    warm(engine, 2)
    warm(engine, 1)
    for name, adapter in (("runs", 1), ("waits", 2)):
        engine.add_request(make_request(name, [adapter] * 6, adapter, 8))
    got: Progress = {}
    for _ in range(3):
        step(engine, got)
    assert "waits" not in got and set(engine.scheduler.adapters.resident) == {hash_of(1), hash_of(2)}
    engine.prefetch_adapter(hash_of(3))
    engine.prefetch_adapter(hash_of(2))
    assert set(engine.scheduler.adapters.resident) == {hash_of(1), hash_of(2)}
    assert not engine.scheduler.adapters.loading, "there is no room, and the wish is dropped"
    drain(engine, got)
    assert hash_of(3) not in executor_of(engine).slots.values()
    version = engine.residency_version
    engine.prefetch_adapter(hash_of(3))
    drain(engine, got)
    assert hash_of(3) in engine.scheduler.adapters.resident and engine.residency_version > version
    engine.forget_adapter(hash_of(4))
    engine.prefetch_adapter(hash_of(4))
    assert not engine.scheduler.adapters.loading
    assert_empty(engine)


def test_what_is_sent_ahead_takes_no_room_that_a_request_waits_for() -> None:
    engine = slow_engine(4, num_slots=2)
    engine.add_request(make_request("first", [1] * 6, 1, 3))
    # No step has seen the request yet.
    engine.prefetch_adapter(hash_of(2))
    assert not engine.scheduler.adapters.loading
    got: Progress = {}
    step(engine, got)
    engine.prefetch_adapter(hash_of(2))
    assert engine.scheduler.adapters.loading == [hash_of(1), hash_of(2)]
    drain(engine, got)
    assert_empty(engine)
