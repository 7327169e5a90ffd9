"""What replicas say on its way to the Orchestrator: understood, once, and in order."""

from __future__ import annotations

from collections.abc import Callable

from peft_dist.core.messages import ProtocolError, decode_report
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.records import Outgoing


class Hearing:
    """Takes in the words of incarnations of this life. One of which a word was lost is over: nobody knows which."""

    def __init__(self, core: Orchestrator, act: Callable[[list[Outgoing]], None], now: Callable[[], float]) -> None:
        """``act``: Sends what the core decided."""
        self._core, self._act, self._now = core, act, now

    def take(self, replica_id: int, epoch: int, data: bytes) -> None:
        """An encoded report of an incarnation; those of one that is over are nobody's."""
        replica = self._core.replicas.alive(replica_id, epoch)
        if replica is None:
            return
        try:
            envelope = decode_report(data)
        except ProtocolError as error:
            self._lose(replica_id, epoch, f"cannot be understood: {error}")
            return
        if replica.inbox.take(envelope.number):
            self._act(self._core.observe(replica_id, envelope.epoch, envelope.message, self._now()))
        elif replica.inbox.missing is not None:
            first, last = replica.inbox.missing
            self._lose(replica_id, epoch, f"lost its connection, and reports {first} to {last} with it", by_link=True)

    def _lose(self, replica_id: int, epoch: int, what: str, *, by_link: bool = False) -> None:
        reason = f"Replica {replica_id} {what}"
        self._act(self._core.lose_replica(replica_id, epoch, reason, self._now(), by_link=by_link))
