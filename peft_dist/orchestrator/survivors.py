"""Replicas that this server started in an earlier life: found as processes, heard again, adopted."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable

from peft_dist.core.messages import AnyReport, Heartbeat, ProtocolError, Shutdown, decode_report
from peft_dist.core.succession import Adopt, Identify, Identity
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.link import Link, Received
from peft_dist.orchestrator.records import Outgoing, Replica

logger = logging.getLogger(__name__)
# Without a word for so long a worker hangs: an orphan says something several times a second, also while it loads.
FIRST_WORD_SECONDS = 10.0
_LONGEST_STEP_SECONDS = 60.0
_ASK_AGAIN_SECONDS = 1.0


class Survivors:
    """Makes those that are expected incarnations of this life. They come with what they had, less their requests."""

    def __init__(
        self, core: Orchestrator, link: Link, now: Callable[[], float], start_timeout: float | None = None
    ) -> None:
        """``start_timeout``: Seconds to become ready, for one that is heard while it loads; None is no limit."""
        self._core = core
        self._link = link
        self._now = now
        self._start_timeout = start_timeout
        # By replica, the epoch that was first heard of it; by that, when it was asked last, and when it must be ready.
        self._heard: dict[int, int] = {}
        self._asked: dict[int, float] = {}
        self._limits: dict[int, float] = {}

    def expect(self, replica_id: int) -> Replica:
        """Enter a replica whose process was found: it starts by being heard."""
        replica = self._core.add_replica(replica_id, self._now(), FIRST_WORD_SECONDS)
        replica.is_survivor = True
        return replica

    def hear(self, received: Received) -> list[Outgoing]:
        """Something was said under the epoch of another life. Returns what follows for others."""
        if received.replica_id is None:
            return []
        replica, now = self._core.replicas.get(received.replica_id), self._now()
        is_expected = replica is not None and replica.is_alive and replica.is_survivor
        epoch = self._heard.setdefault(received.replica_id, received.epoch) if is_expected else None
        if replica is None or epoch != received.epoch:
            if replica is None or not replica.was_adopted:
                logger.warning("a worker of another life, as replica %d, is told to end", received.replica_id)
            self._link.answer(received.listener, Shutdown(), received.epoch)
            return []
        # It has said something, and may be silent for so long again; but not start for ever.
        limit = self._limits.setdefault(epoch, math.inf if self._start_timeout is None else now + self._start_timeout)
        replica.start_deadline = min(now + FIRST_WORD_SECONDS, limit)
        report = _decode(received.data)
        if isinstance(report, Identity):
            adopt = Adopt(replica_id=replica.replica_id, incarnation=replica.epoch, pid=os.getpid())
            self._link.answer(received.listener, adopt, epoch)
        elif isinstance(report, Heartbeat) and report.busy_seconds > _LONGEST_STEP_SECONDS:
            # Its answer would come after this step, which does not end.
            reason = f"Replica {replica.replica_id} has been in one step for {report.busy_seconds:.0f} s."
            return self._core.lose_replica(replica.replica_id, replica.epoch, reason, now, hangs=True)
        elif now >= self._asked.get(epoch, -_ASK_AGAIN_SECONDS) + _ASK_AGAIN_SECONDS:
            self._asked[epoch] = now
            self._link.answer(received.listener, Identify(), epoch)
        return []


def _decode(data: bytes) -> AnyReport | None:
    try:
        return decode_report(data).message
    except ProtocolError:
        # Launched by this very protocol: what it sends later will be understood, or it ends in time.
        return None
