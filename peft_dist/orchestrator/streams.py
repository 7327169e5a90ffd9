"""One request's way back to whoever waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import SequenceProgress


class Stream:
    """The ``RequestStream`` of one admitted request.

    It has one reader. Every token of every request passes through here, so this is less than an ``asyncio.Queue``.
    """

    def __init__(self, num_sequences: int, on_close: Callable[[], None], keep: Callable[[int], None]) -> None:
        """``on_close``: Called when it is closed before its end. ``keep``: Called with a change of the number of
        sequences that have ended, and whose end was not read."""
        self._items: deque[tuple[int, SequenceProgress] | PeftDistError] = deque()
        self._waiter: asyncio.Future[None] | None = None
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
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self._close()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str, num_sequences: int) -> Stream:
        stream = self._streams[request_id] = Stream(num_sequences, lambda: self._abandon(request_id), self._keep)
        self._idle.clear()
        return stream

    def put(self, request_id: str, sequence_index: int, progress: SequenceProgress) -> None:
        """Pass on progress, if anybody reads it."""
        stream = self._streams.get(request_id)
        if stream is not None and stream.put(sequence_index, progress):
            self._drop(request_id)

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
