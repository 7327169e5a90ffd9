"""When a service has started."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from peft_dist.core.errors import PeftDistError

logger = logging.getLogger(__name__)
# What other replicas of an earlier life get to tell of names once the first has.
_PATIENCE = 1.0
_GRACE_WHILE_STARTING = 1.0


class Startup:
    """Done when all replicas are ready; or those that an earlier life left, which need not wait for new ones."""

    def __init__(self, num_replicas: int, left: Collection[int], stop_grace: float) -> None:
        """``left``: Replicas that run already. ``stop_grace``: Seconds for one to end that has served."""
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._wanted = max(num_replicas, 1)
        self._left = set(left)
        self._stop_grace = stop_grace
        self._came = False
        self._error: PeftDistError | None = None

    async def wait(self) -> None:
        """Raises what ``lost`` was told where that leaves nobody."""
        await asyncio.shield(self._done)

    @property
    def grace(self) -> float:
        """Seconds for a replica to end: one that never was ready may be stuck in loading, and has nothing to finish."""
        is_over = self._done.done() and not self.has_failed
        return self._stop_grace if is_over else min(self._stop_grace, _GRACE_WHILE_STARTING)

    @property
    def has_failed(self) -> bool:
        """Whether ``wait`` raises, and so tells why."""
        return self._done.done() and self._done.exception() is not None

    def ready(self, replica_id: int, num_ready: int, *, adopted: bool) -> None:
        """A replica is ready; there are ``num_ready`` now."""
        self._left.discard(replica_id)
        if adopted:
            logger.info("replica %d outlived the server before this one: it goes on, with what it holds", replica_id)
            if not self._came:
                self._came = True
                self._loop.call_later(_PATIENCE, self._end)
        if num_ready >= self._wanted or (self._came and not self._left):
            self._end()

    def lost(self, replica_id: int, error: PeftDistError) -> None:
        """A replica of this service died: an error, unless it is one that was left, and others may serve."""
        if replica_id in self._left:
            self._left.discard(replica_id)
        else:
            self._error = error
        if self._came and not self._left:
            self._end()
        elif self._error is not None and not self._left and not self._came and not self._done.done():
            self._done.set_exception(self._error)

    def _end(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
