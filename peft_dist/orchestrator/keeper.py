"""What is done about the replicas' processes when they end, are lost, go on as others, or are to be started again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import ReplicaLost, ReplicaRenewed
from peft_dist.orchestrator.guests import Guests
from peft_dist.orchestrator.processes import Processes
from peft_dist.orchestrator.promises import Promises
from peft_dist.orchestrator.records import Outgoing
from peft_dist.orchestrator.renewals import Renewals
from peft_dist.orchestrator.startup import Startup

logger = logging.getLogger(__name__)


class Keeper:
    """Carries out what the Orchestrator decided of replicas, and tells it how they ended."""

    def __init__(
        self,
        core: Orchestrator,
        processes: Processes,
        renewals: Renewals,
        guests: Guests | None,
        promises: Promises,
        startup: Startup,
        act: Callable[[list[Outgoing]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        now: Callable[[], float],
    ) -> None:
        """``act``: Sends what the core decided. ``spawn``: Runs beside this."""
        self._core, self._processes, self._renewals, self._guests = core, processes, renewals, guests
        self._promises, self._startup = promises, startup
        self._act, self._spawn, self._now = act, spawn, now

    async def supervise(self, replica_id: int, epoch: int) -> None:
        """Wait for the end of a replica's process."""
        end = await self._processes.end(replica_id)
        self._act(self._core.lose_replica(replica_id, epoch, f"Replica {replica_id} {end}.", self._now()))

    async def restart(self, replica_id: int, epoch: int) -> None:
        """Start an incarnation once the process of the one before has ended, and wait for its end."""
        try:
            await self._processes.restart(replica_id, epoch)
        except OSError as error:
            reason = f"Replica {replica_id} could not be started: {error}"
            self._act(self._core.lose_replica(replica_id, epoch, reason, self._now()))
        else:
            await self.supervise(replica_id, epoch)

    def ready(self, replica_id: int) -> None:
        """A replica has become ready."""
        replica = self._core.replicas[replica_id]
        if replica.is_renewed:
            logger.info("replica %d goes on, with what it holds", replica_id)
        outlived = replica.was_adopted and not replica.is_renewed
        self._startup.ready(replica_id, len(self._core.replicas.ready()), adopted=outlived)

    def drained(self, replica_id: int, *, leaves: bool) -> None:
        """A draining replica is empty; one that ``leaves`` was told to end."""
        self._promises.end_drain(replica_id, None)
        if leaves:
            self._spawn(self._processes.stop(replica_id, self._startup.grace))

    def lost(self, lost: ReplicaLost) -> None:
        """A replica is dead: see that its process ends."""
        is_ours, grace = lost.replica_id in self._processes, self._startup.grace
        if is_ours:
            self._startup.lost(lost.replica_id, lost.error)
        if lost.was_asked:
            logger.info("replica %d has ended%s", lost.replica_id, " and is started again" if is_ours else "")
        elif not self._startup.has_failed:  # Whoever starts this gets the error, and had better see it once.
            logger.error("replica %d is lost: %s", lost.replica_id, lost.error)
        if lost.hangs:
            self._processes.kill(lost.replica_id)
        else:
            self._spawn(self._processes.stop(lost.replica_id, grace))
        self._promises.end_drain(lost.replica_id, self._core.lives.lost_draining(lost.replica_id, lost.error))
        self._promises.keep_drain(lost.replica_id)

    def renewed(self, renewed: ReplicaRenewed) -> None:
        """The process of a replica is to go on as another incarnation, which is told to it."""
        logger.warning("%s Its requests go elsewhere or wait, and it goes on with what it holds.", renewed.error)
        # Whoever drains it waits until it says that it is another one, which is drained as well.
        self._promises.keep_drain(renewed.replica_id)
        replica = self._core.replicas[renewed.replica_id]
        if replica.is_guest and self._guests is not None:
            self._guests.renew(replica, renewed.epoch)
            return
        self._renewals.begin(replica, renewed.epoch)
        self._spawn(self.supervise(replica.replica_id, replica.epoch))
