"""Reports of decode steps that are alike, taken in when somebody looks, and not one by one."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Iterable, Sequence

import msgspec

from peft_dist.core.messages import ReplicaStats
from peft_dist.orchestrator.records import Replica, RequestRecord, SequenceRecord
from peft_dist.orchestrator.requests import RequestTable

Drew = Callable[[RequestRecord, "array[float]"], None]


class _Member(msgspec.Struct):
    """A sequence of which each step draws a token. ``since``: Steps before its first one; ``owed``: As it owed then.

    ``is_owing``: Whether the next step counts in its replica's backlog.
    """

    record: RequestRecord
    sequence: SequenceRecord
    since: int
    owed: float
    is_owing: bool


class EqualSteps:
    """Steps of one replica, each of which drew one token for each of the same sequences and ended none.

    The replica's backlog is right after every ``take_in``. The record of a sequence is after it has left, or after
    ``settle``: one must come before anything but an admission looks at it. All sequences must have drawn a token that
    was reported where they are.
    """

    def __init__(
        self,
        requests: RequestTable,
        replica: Replica,
        token: int,
        drew: Drew | None = None,
        refresh: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            token: That each drew each time.
            drew: Hears of a request when a token was reported for it.
            refresh: Takes in what has come by now, before the backlog's tokens count.
        """
        self._requests = requests
        self._replica = replica
        self._token = token
        self._drew = drew
        # When each step was reported.
        self._times = array("d")
        self._heard = -math.inf
        self._members: dict[str, _Member] = {}
        # The very list of them that was given last, while all of it are members.
        self._all: Sequence[str] | None = None
        self._num_owing = 0
        if refresh is not None:
            requests.keep_late(replica.replica_id, refresh)
        # When the last whole token that each owes is drawn.
        self._wholes: list[tuple[int, str]] = []

    def set_members(self, sequence_ids: Sequence[str]) -> None:
        """The next steps are of these sequences. Those that this replica has not, or not any more, are passed over."""
        members = self._members
        if sequence_ids is self._all:
            return
        came = [sequence_id for sequence_id in sequence_ids if sequence_id not in members]
        if len(sequence_ids) - len(came) < len(members):
            self.leave(members.keys() - set(sequence_ids))
        for sequence_id in came:
            self._join(sequence_id)
        # Of one that is passed over it may be told later that it is here.
        self._all = sequence_ids if len(members) == len(sequence_ids) else None

    def leave(self, sequence_ids: Iterable[str]) -> None:
        """Some draw no more tokens by these steps: their records are right from now on."""
        self._all = None
        for sequence_id in sequence_ids:
            member = self._members.pop(sequence_id, None)
            if member is not None:
                self._settle(member)
                self._num_owing -= member.is_owing

    def take_in(self, times: Sequence[float], now: float, num_taken: int | None = None) -> None:
        """More steps were reported, the last one ``now``.

        Args:
            times: When each was, as ``drew`` is to hear it.
            num_taken: As of ``Progress``.
        """
        self._heard = now
        if num_taken is not None:
            self._replica.has_taken(num_taken)
        step, end = len(self._times), len(self._times) + len(times)
        self._times.extend(times)
        if not self._members:
            return
        backlog, wholes = self._requests.backlog(self._replica.replica_id), self._wholes
        while wholes and wholes[0][0] < end:
            last = wholes[0][0]
            if last < step:
                heapq.heappop(wholes)  # Of one that has left.
                continue
            # As one by one: 1 is a multiple of what any of these numbers is rounded to.
            backlog.output_tokens -= float((last - step) * self._num_owing)
            self._draw_rest(last)
            step = last + 1
        backlog.output_tokens -= float((end - step) * self._num_owing)

    def settle(self, stats: ReplicaStats | None = None, *, whole: bool = True) -> None:
        """Bring all records up to date, and the replica's ``stats`` where they are told.

        Whoever owns a sequence may change afterwards. ``whole``: False for the replica alone.
        """
        if whole and self._members:
            self.leave(list(self._members))
        if stats is not None:
            self._replica.tell(stats)
        if self._heard > self._replica.last_heard:
            self._replica.last_heard = self._heard

    def _join(self, sequence_id: str) -> None:
        owner = self._requests.owner(sequence_id, self._replica.replica_id)
        if owner is None:
            return  # Aborted here while the replica was still at it.
        owed, since = owner[1].owed_output, len(self._times)
        self._members[sequence_id] = _Member(*owner, since, owed, owed > 0)
        if owed:
            self._num_owing += 1
            heapq.heappush(self._wholes, (since + int(owed), sequence_id))

    def _draw_rest(self, step: int) -> None:
        """A step in which some owe no whole token any more: one by one, in an order that depends on nothing else."""
        wholes, backlog = self._wholes, self._requests.backlog(self._replica.replica_id)
        ids = {heapq.heappop(wholes)[1]}
        while wholes and wholes[0][0] == step:
            ids.add(heapq.heappop(wholes)[1])
        owing = [sequence_id for sequence_id, member in self._members.items() if member.is_owing]
        num_before = 0
        for sequence_id in sorted(ids.intersection(owing)):
            member = self._members[sequence_id]
            if member.since + int(member.owed) != step:
                continue  # It left, and came again with more.
            # The whole tokens of those before it, but for the ones that end here too: as one by one.
            position = sum([other < sequence_id for other in owing])
            backlog.output_tokens -= float(position - num_before)
            num_before = position + 1
            backlog.output_tokens -= member.owed - int(member.owed)
            member.is_owing = False
            self._num_owing -= 1
        backlog.output_tokens -= float(len(owing) - num_before)

    def _settle(self, member: _Member) -> None:
        count = len(self._times) - member.since
        if not count:
            return
        sequence = member.sequence
        sequence.output_token_ids += [self._token] * count
        sequence.owed_output = max(member.owed - float(count), 0.0)
        if self._drew is not None:
            self._drew(member.record, self._times[member.since :])
