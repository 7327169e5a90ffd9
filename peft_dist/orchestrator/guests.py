"""Replicas that join: somebody else starts and ends them, on this machine or another one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ReplicaStateError, UnknownReplicaError
from peft_dist.core.messages import Fence, Join, Leave, Ping, ProtocolError, Welcome, decode_report
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.link import Link, Received
from peft_dist.orchestrator.records import Outgoing, Replica

logger = logging.getLogger(__name__)
_START_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where replicas may join, and what they are to run.

    Attributes:
        listen: ``tcp://host:port``.
        keys: Of whoever may; None only where other machines cannot reach the address.
        start_timeout: Seconds to become ready, loading the model included.
    """

    listen: str
    engine: EngineConfig
    replica_factory: str
    keys: ClusterKeys | None = None
    heartbeat_seconds: float = 1.0
    start_timeout: float = _START_TIMEOUT


class Guests:
    """The socket that they join, and which replica each of them is."""

    def __init__(
        self,
        invitation: Invitation,
        core: Orchestrator,
        act: Callable[[list[Outgoing]], None],
        take: Callable[[int, int, bytes], None],
        now: Callable[[], float],
    ) -> None:
        """``act``: Sends what the core decided. ``take``: Hands it a report, by replica id, epoch and encoded bytes.

        Raises:
            ConfigError: nobody can join there.
        """
        self._invitation = invitation
        self._core, self._act, self._take, self._now = core, act, take, now
        self._link = Link.listening(invitation.listen, invitation.keys)
        self._joined: dict[bytes, tuple[Replica, int]] = {}
        self._ids: set[int] = set()

    @property
    def endpoint(self) -> str:
        """Where to join, with the port."""
        return self._link.endpoint

    def sends(self, out: Outgoing) -> bool:
        """Send a command if its replica joined here; whether it did, now or once."""
        if out.replica_id not in self._ids:
            return False
        self._link.send(out)
        return True

    async def run(self) -> None:
        """Hear everybody, and let them hear that this process lives, for ever."""
        await asyncio.gather(self._receive(), self._ping())

    def close(self) -> None:
        self._link.close()

    async def _receive(self) -> None:
        while True:
            received = await self._link.receive()
            if received.replica_id is None:
                self._hear(received)
            elif self._core.replicas.alive(received.replica_id, received.epoch) is None:
                # Cut off, given up, and back again: whatever it says, others have its requests.
                self._link.send(Outgoing(received.replica_id, received.epoch, Fence()))
            else:
                self._take(received.replica_id, received.epoch, received.data)

    async def _ping(self) -> None:
        while True:
            for sender in list(self._joined):
                self._link.answer(sender, Ping())
            await asyncio.sleep(self._invitation.heartbeat_seconds)

    def _hear(self, received: Received) -> None:
        try:
            message = decode_report(received.data).message
        except ProtocolError as error:
            logger.warning("somebody who wants to join cannot be understood: %s", error)
            return
        match message:
            case Join(host=host, attempt=attempt):
                self._welcome(received.sender, host, attempt)
            case Leave(replica_id=replica_id, incarnation=incarnation):
                self._act(self._let_go(replica_id, incarnation))

    def _welcome(self, sender: bytes, host: str, attempt: int) -> None:
        replica, last = self._joined.get(sender, (None, None))
        if replica is None or last != attempt:
            if replica is not None:
                reason = f"Replica {replica.replica_id} on {host} has ended."
                self._act(self._core.lose_replica(replica.replica_id, replica.epoch, reason, self._now()))
            replica = self._core.replicas.join(self._now() + self._invitation.start_timeout)
            self._joined[sender] = replica, attempt
            self._ids.add(replica.replica_id)
            logger.info("replica %d joins from %s", replica.replica_id, host)
            # So that somebody looks when its time to start is over.
            self._act([])
        # Whoever asks twice, because the answer was late, is the same replica still.
        welcome = Welcome(
            attempt=attempt,
            replica_id=replica.replica_id,
            incarnation=replica.epoch,
            engine=self._invitation.engine,
            replica_factory=self._invitation.replica_factory,
            heartbeat_seconds=self._invitation.heartbeat_seconds,
        )
        self._link.answer(sender, welcome)

    def _let_go(self, replica_id: int, incarnation: int) -> list[Outgoing]:
        if self._core.replicas.alive(replica_id, incarnation) is None:
            return []
        now = self._now()
        try:
            return self._core.drain_replica(replica_id, now, restart=True)
        except (ReplicaStateError, UnknownReplicaError):
            # It was not ready yet, or is on its way out already.
            return self._core.lose_replica(replica_id, incarnation, f"Replica {replica_id} has left.", now)
