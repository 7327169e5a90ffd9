"""One request's way back to whoever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import SequenceProgress


class Stream:
    """The ``RequestStream`` of one admitted request. ``on_close`` is called when it is closed before its end."""

    def __init__(self, num_sequences: int, on_close: Callable[[], None]) -> None:
        self._queue: asyncio.Queue[tuple[int, SequenceProgress] | PeftDistError] = asyncio.Queue()
        self._unfinished = num_sequences
        self._left = num_sequences
        self._on_close = on_close
        self._closed = False

    def put(self, sequence_index: int, progress: SequenceProgress) -> bool:
        """Pass on progress; True when it was the request's last."""
        self._queue.put_nowait((sequence_index, progress))
        self._unfinished -= progress.finish_reason is not None
        return not self._unfinished

    def fail(self, error: PeftDistError) -> None:
        """Let the reader get ``error`` after what came before it."""
        self._queue.put_nowait(error)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, SequenceProgress]:
        if self._closed or not self._left:
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, PeftDistError):
            self._left = 0
            raise item
        if item[1].finish_reason is not None:
            self._left -= 1
        return item

    async def aclose(self) -> None:
        """Stop reading; what still runs of the request is aborted."""
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._left:
                self._on_close()


class StreamTable:
    """The streams of all requests that are admitted and have not ended."""

    def __init__(self, abort: Callable[[str], None]) -> None:
        """``abort``: Ends a request whose reader has gone."""
        self._streams: dict[str, Stream] = {}
        self._abort = abort
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str, num_sequences: int) -> Stream:
        stream = self._streams[request_id] = Stream(num_sequences, lambda: self._abandon(request_id))
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
