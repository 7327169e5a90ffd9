"""Incarnations of this life that are over while their processes go on: each is told to be the next one, until it is."""

from __future__ import annotations

from collections.abc import Callable

from peft_dist.core.messages import AnyCommand, Heartbeat, ProtocolError, decode_report
from peft_dist.core.succession import Adopt
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.link import Received
from peft_dist.orchestrator.records import Outgoing, Replica

# Whoever did nothing else for so long, and did not hear what it was told, is not reached: its link is cut one way.
UNREACHED_SECONDS = 3.0
# A process that says nothing for so long hangs; one that talks and is in one step may hear it afterwards.
_SILENCE_SECONDS = 10.0
_LONGEST_SECONDS = 60.0
_ASK_AGAIN_SECONDS = 1.0


class Renewals:
    """Of the replicas of one socket."""

    def __init__(
        self,
        core: Orchestrator,
        answer: Callable[[bytes, AnyCommand, int], None],
        now: Callable[[], float],
        *,
        pid: int | None = None,
        heartbeat_seconds: float | None = None,
    ) -> None:
        """``answer``: Hands a command to the socket of a name, for an epoch. The rest is as in ``Adopt``."""
        self._core, self._answer, self._now = core, answer, now
        self._pid, self._heartbeat_seconds = pid, heartbeat_seconds
        # By replica: the epoch by which its process knows itself, when it was told first and last, and must have become
        # another.
        self._old: dict[int, int] = {}
        self._began: dict[int, float] = {}
        self._told: dict[int, float] = {}
        self._limits: dict[int, float] = {}

    def begin(self, replica: Replica, epoch: int) -> None:
        """The process of an incarnation that is over is to go on as ``replica``."""
        self._old[replica.replica_id], self._began[replica.replica_id] = epoch, self._now()
        self._limits[replica.replica_id] = self._now() + _LONGEST_SECONDS
        self._tell(replica)

    def awaits(self, received: Received) -> bool:
        """Whether it was said by one that is to become another."""
        return self._replica(received) is not None

    def hear(self, received: Received) -> list[Outgoing]:
        """It still is the one it was: the command may have been lost, or waits behind a step. Returns what follows for
        others where it will not be reached."""
        replica, now = self._replica(received), self._now()
        if replica is None:
            return []
        number, beat = replica.replica_id, _beat(received.data)
        if beat is not None and now - beat.busy_seconds >= self._began[number] + UNREACHED_SECONDS:
            reason = f"Replica {number} is heard, and hears nothing of this server: its link works in one direction."
            return self._core.lose_replica(number, replica.epoch, reason, now, hangs=True)
        if now >= self._told[number] + _ASK_AGAIN_SECONDS:
            self._tell(replica)
        return []

    def _replica(self, received: Received) -> Replica | None:
        if received.replica_id is None or self._old.get(received.replica_id) != received.epoch:
            return None
        replica = self._core.replicas.get(received.replica_id)
        return replica if replica is not None and replica.is_alive and replica.is_survivor else None

    def _tell(self, replica: Replica) -> None:
        number, now = replica.replica_id, self._now()
        self._told[number] = now
        replica.start_deadline = min(now + _SILENCE_SECONDS, self._limits[number])
        adopt = Adopt(
            replica_id=number,
            incarnation=replica.epoch,
            heartbeat_seconds=self._heartbeat_seconds,
            pid=self._pid,
        )
        self._answer(f"{number}.{self._old[number]}".encode(), adopt, self._old[number])


def _beat(data: bytes) -> Heartbeat | None:
    """A sign of life; None for all else."""
    try:
        message = decode_report(data).message
    except ProtocolError:
        return None
    return message if isinstance(message, Heartbeat) else None
