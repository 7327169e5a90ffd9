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
