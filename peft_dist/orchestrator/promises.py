"""Who waits for the answer to a load of an adapter, or for a replica to be empty."""

from __future__ import annotations

import asyncio

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import PeftDistError


class Promises:
    """Futures of one event loop, by what they wait for. Whoever waits may be cancelled."""

    def __init__(self) -> None:
        self._loads: dict[int, asyncio.Future[AdapterSpec]] = {}
        self._drains: dict[int, list[asyncio.Future[None]]] = {}

    def load(self, call_id: int) -> asyncio.Future[AdapterSpec]:
        """The outcome of a load."""
        future = self._loads[call_id] = asyncio.get_running_loop().create_future()
        return future

    def answer(self, call_id: int, answer: AdapterSpec | PeftDistError) -> None:
        """A load has ended."""
        call = self._loads.pop(call_id)
        if call.done():
            return
        if isinstance(answer, AdapterSpec):
            call.set_result(answer)
        else:
            call.set_exception(answer)

    def drain(self, replica_id: int) -> asyncio.Future[None]:
        """The moment when a replica is empty."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drains.setdefault(replica_id, []).append(future)
        return future

    def forget_drain(self, replica_id: int, drained: asyncio.Future[None]) -> None:
        """Nobody waits for it any more."""
        waiting = self._drains.get(replica_id, [])
        if drained in waiting:
            waiting.remove(drained)

    def end_drain(self, replica_id: int, error: PeftDistError | None) -> None:
        """A replica is empty, for whatever reason, or will not be."""
        for waiting in self._drains.pop(replica_id, []):
            if waiting.done():
                continue
            if error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(error)
