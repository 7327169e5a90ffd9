"""What sequences bring, and how they and their requests end: once, and told of."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peft_dist.core.errors import EngineDeadError
from peft_dist.core.messages import SequenceProgress
from peft_dist.orchestrator.adapters import AdapterRegistry
from peft_dist.orchestrator.demand import Demand
from peft_dist.orchestrator.equal_steps import Drew, EqualSteps
from peft_dist.orchestrator.events import Event, RequestFailed, SequenceEvent
from peft_dist.orchestrator.records import Replica, RequestRecord, SequenceRecord
from peft_dist.orchestrator.requests import RequestTable, ending, unseen_part
from peft_dist.orchestrator.room import Room


class Endings:
    """Enters what was drawn, takes what has ended out of every table, and says both in ``events``."""

    def __init__(
        self, requests: RequestTable, adapters: AdapterRegistry, demand: Demand, room: Room, events: list[Event]
    ) -> None:
        self._requests, self._adapters, self._demand, self._room, self._events = (
            requests,
            adapters,
            demand,
            room,
            events,
        )
        # Whether another replica is to go on with what one could not load the adapter of.
        self.elsewhere: Callable[[RequestRecord, Replica, str, float], bool] = lambda *_: False

    def advance(
        self, progress: Iterable[SequenceProgress], replica: Replica, now: float
    ) -> list[tuple[RequestRecord, SequenceRecord]]:
        """What a replica says of sequences; returns those that have ended here because it left out tokens of them."""
        broken: list[tuple[RequestRecord, SequenceRecord]] = []
        for each in progress:
            owner = self._requests.owner(each.request_id, replica.replica_id)
            if owner is None:
                continue  # Aborted here while the replica was still at it.
            record, sequence = owner
            new = each
            if each.first_index != len(sequence.output_token_ids):
                try:
                    new = unseen_part(sequence, each)
                except ValueError as error:
                    broken.append(owner)
                    new = ending(sequence, "error", str(error))
            if record.prefix_uses is not None and new.token_ids:
                self._requests.prefixes.found(record, each.num_cached_tokens)
            self._requests.advance(record, sequence, new.token_ids)
            if new.finish_reason is None:
                self._events.append(SequenceEvent(record.request_id, sequence.index, new))
            elif not (new.lacks_adapter and self.elsewhere(record, replica, new.error or "", now)):
                self.finish(record, sequence, new, now)
        return broken

    def equal_steps(self, replica: Replica, token: int, drew: Drew, refresh: Callable[[], None]) -> EqualSteps:
        """How to report steps that are alike, and end nothing, other than one by one; arguments as there."""
        return EqualSteps(self._requests, replica, token, drew, refresh)

    def finish(self, record: RequestRecord, sequence: SequenceRecord, last: SequenceProgress, now: float) -> None:
        """A sequence is complete; ``last`` has its finish_reason."""
        self._events.append(SequenceEvent(record.request_id, sequence.index, last))
        self._demand.ended(record, sequence, now)
        if self._requests.close(record, sequence):
            self._adapters.release(record.adapter)
        self._room.ended(now)

    def fail(self, records: Iterable[RequestRecord], error: EngineDeadError) -> None:
        """Requests end before they are complete."""
        for record in records:
            for sequence in list(record.unfinished.values()):
                self._requests.close(record, sequence)
            self._adapters.release(record.adapter)
            self._events.append(RequestFailed(record.request_id, error))
