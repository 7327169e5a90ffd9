"""What replicas say of the requests that they run."""

from __future__ import annotations

from collections.abc import Sequence

from peft_dist.core.messages import Progress
from peft_dist.orchestrator.endings import Endings
from peft_dist.orchestrator.equal_steps import EqualSteps
from peft_dist.orchestrator.placer import Placer
from peft_dist.orchestrator.records import Event, Outgoing, Replica, SequenceEvent
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable, ending, unseen_part


class Intake:
    """Takes progress into the tables, and tells of it in ``events``."""

    def __init__(
        self, requests: RequestTable, replicas: ReplicaTable, placer: Placer, endings: Endings, events: list[Event]
    ) -> None:
        self._requests = requests
        self._replicas = replicas
        self._placer = placer
        self._endings = endings
        self._events = events

    def take(self, replica: Replica, report: Progress, now: float) -> list[Outgoing]:
        """A replica's state, and new tokens and ends of its sequences. Returns aborts of those that it got wrong."""
        self._replicas.take_in(replica, report)
        out: list[Outgoing] = []
        for progress in report.sequences:
            owner = self._requests.owner(progress.request_id, replica.replica_id)
            if owner is None:
                continue  # Aborted here while the replica was still at it.
            record, sequence = owner
            try:
                new = unseen_part(sequence, progress)
            except ValueError as error:
                out += self._placer.stop(record, sequence)
                new = ending(sequence, "error", str(error))
            self._requests.advance(record, sequence, new.token_ids)
            if new.finish_reason is None:
                self._events.append(SequenceEvent(record.request_id, sequence.index, new))
            else:
                self._endings.finish(record, sequence, new, now)
        return out

    def equal_steps(self, replica: Replica, sequence_ids: Sequence[str], token: int) -> EqualSteps:
        """How who drives this may report steps that are alike, and end nothing, other than by ``observe``."""
        return EqualSteps(self._requests, replica, sequence_ids, token)
