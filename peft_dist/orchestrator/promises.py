"""Who waits for the answer to a load of an adapter, for names to be safe, or for a replica to be empty."""

from __future__ import annotations

import asyncio

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import PeftDistError

# A replica in a long step takes its time; whoever changed a name need not wait for it to end.
_KEPT_SECONDS = 2.0


class Promises:
    """Futures of one event loop, by what they wait for. Whoever waits may be cancelled."""

    def __init__(self) -> None:
        self._loads: dict[int, asyncio.Future[AdapterSpec]] = {}
        self._kept_version = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._drains: dict[int, list[asyncio.Future[None]]] = {}
        self._told: dict[int, list[asyncio.Future[None]]] = {}

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

    async def kept(self, version: int) -> None:
        """Return when the names of this version outlive this process, or soon."""
        if self._kept_version < version:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((version, future))
            await asyncio.wait([future], timeout=_KEPT_SECONDS)

    def keep(self, version: int) -> None:
        """The names of this version do."""
        self._kept_version = version
        for wanted, future in self._waiting:
            if wanted <= version and not future.done():
                future.set_result(None)
        self._waiting = [(wanted, future) for wanted, future in self._waiting if not future.done()]

    def drain(self, replica_id: int) -> asyncio.Future[None]:
        """The moment when a replica is empty."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drains.setdefault(replica_id, []).append(future)
        return future

    async def drain_kept(self, replica_id: int) -> None:
        """Return when a replica, which was told whether it is drained, remembers that, or soon."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._told.setdefault(replica_id, []).append(future)
        await asyncio.wait([future], timeout=_KEPT_SECONDS)

    def keep_drain(self, replica_id: int) -> None:
        """It does, or never will."""
        for future in self._told.pop(replica_id, []):
            future.set_result(None)

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
