"""Reports of decode steps that are alike, taken in when somebody looks, and not one by one."""

from __future__ import annotations

from collections.abc import Sequence

from peft_dist.core.messages import ReplicaStats
from peft_dist.orchestrator.records import Replica, RequestRecord, SequenceRecord
from peft_dist.orchestrator.requests import RequestTable


class EqualSteps:
    """Steps of one replica, each of which drew one token for the same sequences and ended none.

    The replica's backlog is right after every ``take_in``. The records of the sequences are after ``settle``, which
    must come before anything but an admission: before reports, plans and whatever else looks at a running request. All
    sequences must have drawn a token that was reported where they are.

    Args:
        sequence_ids: In the order of the reports.
        token: That each drew each time.
    """

    def __init__(self, requests: RequestTable, replica: Replica, sequence_ids: Sequence[str], token: int) -> None:
        found = (requests.owner(sequence_id, replica.replica_id) for sequence_id in sequence_ids)
        # Others were aborted here while the replica was still at it.
        self._owners: list[tuple[RequestRecord, SequenceRecord]] = [owner for owner in found if owner is not None]
        self._requests = requests
        self._replica = replica
        self._backlog = requests.backlog(replica.replica_id)
        self._token = token
        self._unsettled = 0
        self._plan()

    @property
    def request_ids(self) -> list[str]:
        """Of the sequences that have an owner."""
        return [record.request_id for record, _ in self._owners]

    def take_in(self, count: int) -> None:
        """So many more steps were reported."""
        while count:
            if now := min(count, self._num_whole):
                # As one by one: 1 is a multiple of what any of these numbers is rounded to.
                self._backlog.output_tokens -= float(now * self._num_owing)
                self._num_whole -= now
                self._unsettled += now
                count -= now
                continue
            self.settle()
            for record, sequence in self._owners:
                self._requests.advance(record, sequence, [self._token])
            self._plan()
            count -= 1

    def settle(self, stats: ReplicaStats | None = None, now: float | None = None) -> None:
        """Bring the records up to date; and the replica's ``stats``, reported at ``now``."""
        count, self._unsettled = self._unsettled, 0
        if count:
            drawn = [self._token] * count
            for _, sequence in self._owners:
                sequence.output_token_ids += drawn
                if sequence.owed_output:
                    sequence.owed_output -= float(count)
        if stats is not None:
            self._replica.stats = stats
        if now is not None:
            self._replica.last_heard = now

    def _plan(self) -> None:
        """For how many steps every sequence that owes tokens owes a whole one."""
        owed = [sequence.owed_output for _, sequence in self._owners if sequence.owed_output]
        self._num_owing = len(owed)
        self._num_whole = int(min(owed, default=float(1 << 40)))
