"""Which replica has which request: giving, taking away, and giving again after a replica was lost or is drained."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from peft_dist.core.messages import AbortRequest
from peft_dist.orchestrator.adapter_calls import AdapterCalls, to
from peft_dist.orchestrator.dispatcher import Dispatcher, Lengths
from peft_dist.orchestrator.events import Event, MovesLeft
from peft_dist.orchestrator.hosting import Hosting
from peft_dist.orchestrator.poison import find_guilty
from peft_dist.orchestrator.records import (
    Outgoing,
    Replica,
    ReplicaState,
    RequestRecord,
    SequenceRecord,
)
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable, add_commands
from peft_dist.policy.dispatch import Backlog


class Placer:
    """Gives requests to replicas that hold their adapters. Calls return commands to send.

    Attributes:
        mover: What moves requests from draining replicas: ``move``, unless there is something better. None is returned
            for one that has to wait for its turn: ``go_on`` is to be called when it may have come.
        under_way: Requests that are being moved, and where to.
        moves_at_once: Of draining replicas, or of a lost one, in one call: each may be sent with all its tokens.
        goes_on_at: When ``go_on`` is due for what was left; infinity for never.
        places_at: The same of ``place_waiting``.
    """

    def __init__(
        self,
        requests: RequestTable,
        replicas: ReplicaTable,
        calls: AdapterCalls,
        max_num_seqs: int,
        lengths: Lengths,
        hosting: Hosting,
        events: list[Event],
    ) -> None:
        self._requests = requests
        self._events = events
        self._replicas = replicas
        self._calls = calls
        self._lengths = lengths
        self._hosting = hosting
        self._dispatcher = Dispatcher(requests, lengths, max_num_seqs, hosting.placed)
        self.mover: Callable[[RequestRecord, Replica, float], list[Outgoing] | None] = self.move
        self.under_way: Callable[[], list[tuple[RequestRecord, Replica]]] = list
        self.moves_at_once = 16
        self.goes_on_at = self.places_at = math.inf
        # Draining replicas, and their requests whose turn has not come.
        self._leaving: list[tuple[Replica, deque[RequestRecord]]] = []
        # The last suspect that was placed.
        self._tried: RequestRecord | None = None

    def place(self, record: RequestRecord, now: float) -> list[Outgoing]:
        """Send a request that no replica has to the best one; nothing happens while none can take it."""
        able = self._able(record)
        if not able or (record.is_suspect and self._is_trying):
            return []
        if record.is_suspect:
            self._tried = record
        return self._give(record, self._choose(record, able, now), now)

    def place_waiting(self, now: float) -> list[Outgoing]:
        """Place what can be placed of all that waits, oldest first; some of it, where it is much (``MovesLeft``)."""
        out: list[Outgoing] = []
        num_placed = 0
        self.places_at = math.inf
        for record in self._requests.unplaced():
            if num_placed == self.moves_at_once:
                # Whether anybody can take the others shows then.
                self.places_at = now
                self._events.append(MovesLeft())
                break
            commands = self.place(record, now)
            num_placed += bool(commands)
            out += commands
        return out

    def is_hopeless(self, record: RequestRecord) -> bool:
        """Whether no replica can run it, nor will be able to by itself."""
        content = record.content_hash
        return next(self._each_able(record), None) is None and not any(
            self._calls.is_coming(replica, content) for replica in self._replicas.all()
        )

    def move(self, record: RequestRecord, replica: Replica, now: float) -> list[Outgoing]:
        """Have another replica, which must hold its adapter, go on with a request from the tokens that are known."""
        assert record.replica_id is not None
        old = self._replicas[record.replica_id]
        ids = [sequence.sequence_id for sequence in record.unfinished.values()]
        self._requests.take(record, now)
        return [to(old, AbortRequest(request_ids=ids)), *self._give(record, replica, now)]

    def stop(self, record: RequestRecord, *sequences: SequenceRecord) -> list[Outgoing]:
        """Have the replica that has a request end some of its sequences."""
        if record.replica_id is None:
            return []
        ids = [sequence.sequence_id for sequence in sequences]
        return [to(self._replicas[record.replica_id], AbortRequest(request_ids=ids))]

    def can_take(self, record: RequestRecord, replica: Replica) -> bool:
        """Whether a replica takes requests, and can run this one."""
        return replica.state is ReplicaState.READY and self._calls.holds(replica, record.content_hash)

    def adopt(
        self, record: RequestRecord, replica: Replica, ids: Mapping[int, str], computed: Mapping[int, int], now: float
    ) -> None:
        """Note that another replica runs a request, its sequences known by ``ids``, from the KV that it was brought."""
        self._requests.take(record, now, ids)
        self._requests.place(record, replica.replica_id, self._lengths.expected(record), computed)
        self._note_sent(record, replica, computes=False)

    def flee(self, record: RequestRecord, now: float) -> list[Outgoing]:
        """Move a request from its replica to the best other one, if any can run it."""
        able = self._able(record)
        return self.move(record, self._choose(record, able, now), now) if able else []

    def leave(self, record: RequestRecord, replica: Replica, now: float) -> bool:
        """Have a request that has ended on its replica wait for another one; whether any can run it."""
        if all(able is replica for able in self._able(record)):
            return False
        self._requests.take(record, now)
        return True

    def evacuate(self, now: float) -> list[Outgoing]:
        """Move what can be moved from draining replicas; what no other can run finishes where it is.

        With their KV they leave a few at a time, and the others run on meanwhile (``go_on``). Those that are in no
        batch yet have nothing to bring, and go first.
        """
        self._leaving = [
            (old, deque(sorted(self._requests.on_replica(old.replica_id), key=lambda record: record.has_started)))
            for old in self._replicas.in_state(ReplicaState.DRAINING)
        ]
        return self.go_on(now)

    def go_on(self, now: float) -> list[Outgoing]:
        """Move those of draining replicas whose turn has come; some of them, where they are many (``MovesLeft``).

        Those that take their KV along are their old replicas' until it has come: where they go they count from now on,
        or all would go to one.
        """
        self.goes_on_at = math.inf
        if not self._leaving:
            return []
        out: list[Outgoing] = []
        coming: dict[int, Backlog] = {}
        moving = self.under_way()
        for record, target in moving:
            self._expect(coming, record, target)
        moves = {record.request_id for record, _ in moving}
        num_moved = 0
        for old, records in self._leaving:
            while records and old.state is ReplicaState.DRAINING and num_moved < self.moves_at_once:
                record = records[0]
                is_there = record.unfinished and record.replica_id == old.replica_id
                if is_there and record.request_id not in moves and (able := self._able(record)):
                    target = self._choose(record, able, now, coming)
                    moved = self.mover(record, target, now)
                    if moved is None:
                        break
                    out += moved
                    num_moved += 1
                    self._expect(coming, record, target)
                records.popleft()
        self._leaving = [one for one in self._leaving if one[1] and one[0].state is ReplicaState.DRAINING]
        if self._leaving and num_moved == self.moves_at_once:
            self.goes_on_at = now
            self._events.append(MovesLeft())
        return out

    def _expect(self, coming: dict[int, Backlog], record: RequestRecord, target: Replica) -> None:
        """Count a request that goes to a replica, at once or with its KV."""
        number, with_kv = target.replica_id, record.replica_id != target.replica_id
        if with_kv and number not in coming:
            # What has gone there at once is in this copy.
            coming[number] = self._requests.forecast(number)
        if number in coming:
            self._requests.expect(coming[number], record, self._lengths.expected(record), with_kv=with_kv)

    def orphan(
        self,
        replica: Replica,
        now: float,
        *,
        by_death: bool,
        brought: Sequence[RequestRecord] = (),
        is_unseen: bool = False,
    ) -> RequestRecord | None:
        """Take all requests from a replica; returns the one that it and another one died of, where that is clear.

        ``brought``: Those that were to come to it with their KV; they stay where they are. ``is_unseen``: As in
        ``Fault``.
        """
        self._requests.prefixes.forget(replica.replica_id)
        records = self._requests.on_replica(replica.replica_id)
        guilty = find_guilty(records, brought, is_unseen=is_unseen) if by_death else None
        for record in records:
            self._requests.take(record, now)
        return guilty

    @property
    def _is_trying(self) -> bool:
        tried = self._tried
        return tried is not None and tried.is_suspect and tried.replica_id is not None and bool(tried.unfinished)

    def _able(self, record: RequestRecord) -> list[Replica]:
        return list(self._each_able(record))

    def _each_able(self, record: RequestRecord) -> Iterator[Replica]:
        """For who may need no more than the first."""
        ready = self._replicas.ready()
        if not record.content_hash:
            return iter(ready)
        holders = self._calls.holders(record.content_hash)
        return (replica for replica in ready if replica.replica_id in holders)

    def _choose(
        self, record: RequestRecord, able: Sequence[Replica], now: float, coming: Mapping[int, Backlog] | None = None
    ) -> Replica:
        return self._dispatcher.choose(record, self._hosting.among(record, able, now), coming)

    def _give(self, record: RequestRecord, replica: Replica, now: float) -> list[Outgoing]:
        prefixes = self._requests.prefixes
        # The first one computes the prompt for all.
        cached = {next(iter(record.unfinished)): prefixes.cached(record, replica)}
        self._requests.place(record, replica.replica_id, self._lengths.expected(record), cached)
        self._note_sent(record, replica, computes=True)
        replica.was_sent(record)
        self._hosting.given(record, replica)
        return [to(replica, command) for command in add_commands(record, now)]

    def _note_sent(self, record: RequestRecord, replica: Replica, *, computes: bool) -> None:
        # With one replica there is nothing to choose, and hashing is not worth it.
        if self._requests.prefixes.is_on and len(self._replicas) > 1:
            self._requests.prefixes.sent(record, replica, computes=computes)
