"""One request's way back to whoever waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import SequenceProgress
from peft_dist.orchestrator.events import Event, SequenceEvent

# Readers that are woken in one round of the event loop.
WOKEN_AT_ONCE = 32


class Wakes:
    """Wakes readers some at a time, in the order in which something came for them.

    A step brings tokens for all of them at once. What those write that were woken leaves with the end of a round of the
    loop: so the first clients read while the others' readers run, and nobody else waits for all of them.
    """

    def __init__(self, at_once: int = WOKEN_AT_ONCE) -> None:
        self._at_once = at_once
        self._asleep: deque[asyncio.Future[None]] = deque()

    def add(self, reader: asyncio.Future[None]) -> None:
        """Wake a reader when its turn comes; one that has gone by then is passed over."""
        if not self._asleep:
            reader.get_loop().call_soon(self._wake)
        self._asleep.append(reader)

    def _wake(self) -> None:
        asleep = self._asleep
        for _ in range(min(self._at_once, len(asleep))):
            reader = asleep.popleft()
            if not reader.done():
                reader.set_result(None)
        if asleep:
            asleep[0].get_loop().call_soon(self._wake)


class Stream:
    """The ``RequestStream`` of one admitted request.

    It has one reader. Every token of every request passes through here, so this is less than an ``asyncio.Queue``.
    """

    def __init__(
        self, num_sequences: int, on_close: Callable[[], None], keep: Callable[[int], None], wakes: Wakes | None = None
    ) -> None:
        """``on_close``: Called when it is closed before its end. ``keep``: Called with a change of the number of
        sequences that have ended, and whose end was not read. ``wakes``: Shared with other streams."""
        self._items: deque[tuple[int, SequenceProgress] | PeftDistError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._wakes = wakes or Wakes()
        self._unfinished = num_sequences
        self._left = num_sequences
        self._unread = 0
        self._on_close = on_close
        self._keep = keep
        self._closed = False

    def put(self, sequence_index: int, progress: SequenceProgress) -> bool:
        """Pass on progress; True when it was the request's last."""
        self._items.append((sequence_index, progress))
        self._wake()
        if progress.finish_reason is not None:
            self._unfinished -= 1
            self._count(1)
        return not self._unfinished

    def fail(self, error: PeftDistError) -> None:
        """Let the reader get ``error`` after what came before it."""
        self._items.append(error)
        self._wake()
        self._count(self._unfinished)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, SequenceProgress]:
        if self._closed or not self._left:
            raise StopAsyncIteration
        if not self._items:
            await self._wait()
        item = self._items.popleft()
        if isinstance(item, PeftDistError):
            self._left = 0
            self._count(-self._unread)
            raise item
        self._note_read(item[1])
        return item

    def take_ready(self, limit: int) -> list[tuple[int, SequenceProgress]]:
        """As in ``RequestStream``."""
        ready: list[tuple[int, SequenceProgress]] = []
        while self._items and len(ready) < limit and not self._closed:
            item = self._items[0]
            if isinstance(item, PeftDistError):
                break
            ready.append(item)
            self._items.popleft()
            self._note_read(item[1])
        return ready

    def _note_read(self, progress: SequenceProgress) -> None:
        if progress.finish_reason is not None:
            self._left -= 1
            self._count(-1)

    def _count(self, change: int) -> None:
        self._unread += change
        self._keep(change)

    async def _wait(self) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        except asyncio.CancelledError:
            self._close()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            self._wakes.add(waiter)

    async def aclose(self) -> None:
        """Stop reading; what still runs of the request is aborted."""
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._items.clear()
            self._count(-self._unread)
            if self._left:
                self._on_close()


class StreamTable:
    """The streams of all requests that are admitted and have not ended."""

    def __init__(self, abort: Callable[[str], None], keep: Callable[[int], None]) -> None:
        """``abort``: Ends a request whose reader has gone. ``keep``: As of each ``Stream``."""
        self._streams: dict[str, Stream] = {}
        self._abort = abort
        self._keep = keep
        self._wakes = Wakes()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str, num_sequences: int) -> Stream:
        abandon = partial(self._abandon, request_id)
        stream = self._streams[request_id] = Stream(num_sequences, abandon, self._keep, self._wakes)
        self._idle.clear()
        return stream

    def put_all(self, events: Iterable[Event]) -> list[Event]:
        """Pass on the progress among them, as far as anybody reads it, and return the others: few."""
        others: list[Event] = []
        streams = self._streams
        for event in events:
            if not isinstance(event, SequenceEvent):
                others.append(event)
                continue
            request_id, index, progress = event
            stream = streams.get(request_id)
            if stream is not None and stream.put(index, progress):
                self._drop(request_id)
        return others

    def fail(self, request_id: str, error: PeftDistError) -> None:
        """End a request's stream with an error."""
        if (stream := self._drop(request_id)) is not None:
            stream.fail(error)

    async def wait_until_empty(self, timeout: float) -> bool:
        """False when ``timeout`` seconds were not enough."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _abandon(self, request_id: str) -> None:
        self._drop(request_id)
        self._abort(request_id)

    def _drop(self, request_id: str) -> Stream | None:
        stream = self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()
        return stream
