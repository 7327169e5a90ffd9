"""Replicas that join: somebody else starts and ends them, on this machine or another one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ReplicaStateError, UnknownReplicaError
from peft_dist.core.joining import Join, Leave, Welcome
from peft_dist.core.messages import Fence, Ping, ProtocolError, decode_report
from peft_dist.core.succession import Adopt, Identify, Identity, life_of
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.link import Link, Received
from peft_dist.orchestrator.records import Outgoing, Replica
from peft_dist.orchestrator.renewals import UNREACHED_SECONDS, Renewals

logger = logging.getLogger(__name__)
_START_TIMEOUT = 600.0
# A replica that was asked who it is has loaded its model: it may be in a step.
_ADOPTION_SECONDS = 60.0
_ASK_AGAIN_SECONDS = 1.0
# Replicas have a limit of their own to the silence of this process, of 10 s unless they were told.
_PING_SECONDS = 2.0


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


class _Joined(NamedTuple):
    """Which attempt of somebody became which replica, and when."""

    replica: Replica
    attempt: int
    since: float


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
        # By the socket that asked.
        self._joined: dict[bytes, _Joined] = {}
        # By incarnation in another life, what came of it in this one; and when each was asked who it is.
        self._adopted: dict[bytes, Replica] = {}
        self._asked: dict[bytes, float] = {}
        self._ids: set[int] = set()
        pace = invitation.heartbeat_seconds
        self._renewals = Renewals(core, self._link.answer, now, heartbeat_seconds=pace)

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

    def renew(self, replica: Replica, epoch: int) -> None:
        """The process of an incarnation that is over, for its connection failed, is to go on as ``replica``."""
        number = replica.replica_id
        for sender, joined in list(self._joined.items()):
            if (joined.replica.replica_id, joined.replica.epoch) == (number, epoch):
                self._joined[sender] = joined._replace(replica=replica)
        self._renewals.begin(replica, epoch)

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
            elif life_of(received.epoch) != self._core.life:
                self._hear_of_another_life(received)
            elif self._renewals.awaits(received):
                self._act(self._renewals.hear(received))
            elif self._core.replicas.alive(received.replica_id, received.epoch) is None:
                # Cut off, given up, and back again: whatever it says, others have its requests.
                self._link.send(Outgoing(received.replica_id, received.epoch, Fence()))
            else:
                self._take(received.replica_id, received.epoch, received.data)

    async def _ping(self) -> None:
        while True:
            for replica in self._core.replicas.all_alive():
                if replica.is_guest:
                    self._link.ping(replica)
            self._forget_the_gone()
            await asyncio.sleep(min(self._invitation.heartbeat_seconds, _PING_SECONDS))

    def _forget_the_gone(self) -> None:
        self._joined = {sender: joined for sender, joined in self._joined.items() if joined.replica.is_alive}
        self._adopted = {listener: one for listener, one in self._adopted.items() if one.is_alive}
        last = self._now() - _ASK_AGAIN_SECONDS
        self._asked = {listener: asked for listener, asked in self._asked.items() if asked > last}

    def _hear(self, received: Received) -> None:
        try:
            message = decode_report(received.data).message
        except ProtocolError as error:
            logger.warning("somebody who wants to join cannot be understood: %s", error)
            return
        match message:
            case Join():
                self._link.answer(received.sender, self._answer(received.sender, message))
            case Leave(attempt=attempt):
                joined = self._joined.get(received.sender)
                # It is repeated until the replica has ended, or nobody answers.
                self._link.answer(received.sender, Ping())
                if joined is not None and joined.attempt == attempt and not joined.replica.leaves:
                    self._act(self._let_go(joined.replica.replica_id, joined.replica.epoch))

    def _answer(self, sender: bytes, join: Join) -> Welcome | Ping:
        joined = self._joined.get(sender)
        if joined is not None and not joined.replica.is_alive:
            joined = None
        if joined is not None and (reason := self._is_over(joined, join)) is not None:
            replica = joined.replica
            lost = f"Replica {replica.replica_id} on {join.host} {reason}."
            self._act(self._core.lose_replica(replica.replica_id, replica.epoch, lost, self._now()))
            joined = None
        if joined is None:
            if not join.is_heard:
                return Ping()
            joined = self._enter(sender, join)
        # Whoever asks twice, because the answer was late, is the same replica still.
        return Welcome(
            attempt=join.attempt,
            replica_id=joined.replica.replica_id,
            incarnation=joined.replica.epoch,
            engine=self._invitation.engine,
            replica_factory=self._invitation.replica_factory,
            heartbeat_seconds=self._invitation.heartbeat_seconds,
        )

    def _is_over(self, joined: _Joined, join: Join) -> str | None:
        """Why what somebody joined as is not what it asks for again; None where it is."""
        if joined.attempt != join.attempt:
            return "has ended"
        if not join.is_heard and self._now() >= joined.since + UNREACHED_SECONDS:
            return "did not hear that it has joined: its link works in one direction"
        return None

    def _enter(self, sender: bytes, join: Join) -> _Joined:
        now = self._now()
        replica = self._core.replicas.join(now + self._invitation.start_timeout)
        self._joined[sender] = joined = _Joined(replica, join.attempt, now)
        self._ids.add(replica.replica_id)
        logger.info("replica %d joins from %s", replica.replica_id, join.host)
        # So that somebody looks when its time to start is over.
        self._act([])
        return joined

    def _hear_of_another_life(self, received: Received) -> None:
        """A replica outlived the orchestrator that it had joined: it is asked who it is, then adopted or sent away."""
        listener, now = received.listener, self._now()
        try:
            message = decode_report(received.data).message
        except ProtocolError as error:
            logger.warning("a replica of another life is sent away, for it cannot be understood: %s", error)
            self._link.answer(listener, Fence(), received.epoch)
            return
        if isinstance(message, Identity):
            self._link.answer(listener, self._adopt(received, message), received.epoch)
        elif now >= self._asked.get(listener, -_ASK_AGAIN_SECONDS) + _ASK_AGAIN_SECONDS:
            self._asked[listener] = now
            self._link.answer(listener, Identify(), received.epoch)

    def _adopt(self, received: Received, identity: Identity) -> Adopt | Fence:
        replica = self._adopted.get(received.listener)
        if replica is None:
            if identity.guest is None or (misfit := self._misfit(identity)) is not None:
                reason = "it did not join" if identity.guest is None else misfit
                logger.warning("replica %s on %s is sent away: %s", received.replica_id, identity.host, reason)
                return Fence()
            replica = self._core.replicas.join(self._now() + _ADOPTION_SECONDS, received.replica_id)
            replica.is_survivor = True
            self._adopted[received.listener] = replica
            self._joined[f"join.{identity.guest}".encode()] = _Joined(replica, identity.attempt, self._now())
            self._ids.add(replica.replica_id)
            logger.info("replica %d on %s goes on from another life", replica.replica_id, identity.host)
            self._act([])
        pace = self._invitation.heartbeat_seconds
        return Adopt(replica_id=replica.replica_id, incarnation=replica.epoch, heartbeat_seconds=pace)

    def _misfit(self, identity: Identity) -> str | None:
        """Why a replica is not what would be started for this invitation."""
        wanted = self._invitation
        was, now = asdict(identity.engine), asdict(wanted.engine)
        was["replica_factory"], now["replica_factory"] = identity.replica_factory, wanted.replica_factory
        # What is pinned is the orchestrator's.
        del was["pinned_adapters"], now["pinned_adapters"]
        different = [f"{name} was {was[name]!r} and is {now[name]!r}" for name in now if was[name] != now[name]]
        return ", ".join(different) or None

    def _let_go(self, replica_id: int, incarnation: int) -> list[Outgoing]:
        if self._core.replicas.alive(replica_id, incarnation) is None:
            return []
        now = self._now()
        try:
            return self._core.drain_replica(replica_id, now, restart=True)
        except (ReplicaStateError, UnknownReplicaError):
            # It was not ready yet, or is on its way out already.
            return self._core.lose_replica(replica_id, incarnation, f"Replica {replica_id} has left.", now)
