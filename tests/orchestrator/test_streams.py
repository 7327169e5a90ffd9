"""What a stream hands over at once, and what it keeps back."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from peft_dist.core.errors import EngineDeadError
from peft_dist.core.messages import SequenceProgress
from peft_dist.orchestrator.streams import Stream, Wakes


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


def token(k: int, reason: str | None = None) -> SequenceProgress:
    return SequenceProgress("r-0", [k], k, finish_reason=reason)


@asynccontextmanager
async def waiting(stream: Stream) -> AsyncIterator[asyncio.Task[tuple[int, SequenceProgress]]]:
    """Somebody who waits for the next item."""
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert not reader.done()
    yield reader


@on_loop
async def test_what_is_there_is_taken_in_order_up_to_the_limit() -> None:
    stream = Stream(1, lambda: None, lambda change: None)
    for k in range(5):
        stream.put(0, token(k))
    assert (await anext(stream))[1].token_ids == [0]
    assert [p.token_ids for _, p in stream.take_ready(3)] == [[1], [2], [3]]
    assert [p.token_ids for _, p in stream.take_ready(3)] == [[4]]
    assert stream.take_ready(3) == []


@on_loop
async def test_an_error_comes_behind_the_tokens_before_it() -> None:
    stream = Stream(1, lambda: None, lambda change: None)
    stream.put(0, token(0))
    stream.put(0, token(1))
    stream.fail(EngineDeadError("gone"))
    assert len(stream.take_ready(9)) == 2
    assert stream.take_ready(9) == []
    with pytest.raises(EngineDeadError, match="gone"):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@on_loop
async def test_an_end_that_was_taken_ends_the_stream_and_aborts_nothing() -> None:
    closed: list[bool] = []
    stream = Stream(2, lambda: closed.append(True), lambda change: None)
    assert not stream.put(0, token(0, "stop"))
    assert stream.put(1, token(0, "length"))
    assert len(stream.take_ready(9)) == 2
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await stream.aclose()
    assert not closed


@on_loop
async def test_a_reader_wakes_once_for_several_items() -> None:
    stream = Stream(1, lambda: None, lambda change: None)
    async with waiting(stream) as reader:
        stream.put(0, token(0))
        stream.put(0, token(1))
        assert (await reader)[1].token_ids == [0]
        assert [p.token_ids for _, p in stream.take_ready(9)] == [[1]]


@on_loop
async def test_a_reader_wakes_for_an_error() -> None:
    stream = Stream(1, lambda: None, lambda change: None)
    async with waiting(stream) as reader:
        stream.fail(EngineDeadError("gone"))
        with pytest.raises(EngineDeadError):
            await reader


@on_loop
async def test_cancelling_the_reader_closes_even_when_an_item_has_just_come() -> None:
    closed: list[bool] = []
    stream = Stream(1, lambda: closed.append(True), lambda change: None)
    async with waiting(stream) as reader:
        stream.put(0, token(0))
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
    assert closed == [True]
    assert stream.take_ready(9) == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


class Unread:
    """How many sequences have ended and are not read, as the room of the queue counts them."""

    def __init__(self, num_sequences: int) -> None:
        self.number = 0
        self.stream = Stream(num_sequences, lambda: None, self._change)

    def _change(self, change: int) -> None:
        self.number += change
        assert self.number >= 0


@on_loop
async def test_what_has_ended_counts_until_its_end_is_read() -> None:
    one = Unread(2)
    one.stream.put(0, token(0))
    one.stream.put(1, token(0, "stop"))
    assert one.number == 1, "the other one still runs"
    assert len(one.stream.take_ready(1)) == 1 and one.number == 1
    one.stream.put(0, token(1, "length"))
    assert one.number == 2
    await anext(one.stream)
    assert one.number == 1 and len(one.stream.take_ready(9)) == 1 and one.number == 0
    await one.stream.aclose()
    assert one.number == 0


@on_loop
async def test_what_has_failed_counts_until_that_is_read() -> None:
    one = Unread(3)
    one.stream.put(0, token(0, "stop"))
    one.stream.fail(EngineDeadError("gone"))
    assert one.number == 3 and len(one.stream.take_ready(9)) == 1 and one.number == 2
    with pytest.raises(EngineDeadError):
        await anext(one.stream)
    assert one.number == 0


@on_loop
async def test_whoever_closes_a_stream_lets_go_of_its_tokens() -> None:
    one = Unread(2)
    one.stream.put(0, token(0))
    one.stream.put(0, token(1, "stop"))
    await one.stream.aclose()
    await one.stream.aclose()
    assert one.number == 0 and not one.stream._items


@on_loop
async def test_readers_are_woken_some_at_a_time_in_the_order_of_what_came() -> None:
    wakes = Wakes(at_once=2)
    streams = [Stream(1, lambda: None, lambda change: None, wakes) for _ in range(6)]
    woken: list[int] = []

    async def read(number: int) -> None:
        await anext(streams[number])
        woken.append(number)

    readers = [asyncio.create_task(read(number)) for number in range(6)]
    await asyncio.sleep(0)
    for number in (5, 0, 4, 1, 3, 2):
        streams[number].put(0, token(0))
        streams[number].put(0, token(1))
    # It goes before its turn has come, and costs nobody else his.
    readers[4].cancel()
    rounds = []
    while len(woken) < 5:
        before = len(woken)
        await asyncio.sleep(0)
        rounds.append(woken[before:])
    assert [some for some in rounds if some] == [[5, 0], [1], [3, 2]]
    assert [len(streams[number].take_ready(9)) for number in (5, 4)] == [1, 0]


@on_loop
async def test_who_comes_while_others_are_woken_has_his_turn_behind_them() -> None:
    wakes = Wakes(at_once=1)
    first, second, third = (Stream(1, lambda: None, lambda change: None, wakes) for _ in range(3))
    async with waiting(first) as one, waiting(second) as two, waiting(third) as three:
        first.put(0, token(0))
        second.put(0, token(0))
        while not one.done():
            await asyncio.sleep(0)
        third.put(0, token(0))
        assert not two.done()
        await three
        assert two.done()
