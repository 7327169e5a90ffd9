"""Whose turn it is to leave a replica with its KV: few at once, the others run on there until some have ended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from peft_dist.orchestrator.records import Replica, RequestRecord


@dataclass(slots=True)
class Wish:
    """A move that waits for its turn. Meanwhile the request may end, or leave in another way.

    Attributes:
        cause: Why it moves, for the counts.
        num_moves: The record's when it was asked for.
    """

    record: RequestRecord
    source: Replica
    target: Replica
    cause: str
    num_moves: int

    @property
    def is_current(self) -> bool:
        """Whether the request still runs, where it did."""
        at_source = self.record.replica_id == self.source.replica_id and self.record.num_moves == self.num_moves
        return bool(self.record.unfinished) and at_source


class Turns:
    """How many requests are on their way from each incarnation of a replica, and which ones wait until some have ended.

    More at once are not there sooner: their copies stand behind each other's, and each may stand still meanwhile. And
    until it has arrived, all that a request brings is in memory twice where it comes from.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        """``most``: Requests on their way from one replica at once. ``most_bytes``: Of their KV."""
        self._most, self._most_bytes = most, most_bytes
        self._used: Counter[int] = Counter()
        self._num_bytes: Counter[int] = Counter()
        # In the order in which they were asked for, by incarnation and request.
        self._waiting: dict[int, dict[str, Wish]] = {}

    def is_too_large(self, record: RequestRecord, source: Replica) -> bool:
        """Whether a request is more than may be on its way, even alone."""
        return kv_bytes(record, source) > self._most_bytes

    def may_begin(self, record: RequestRecord, source: Replica) -> bool:
        """Whether one may leave that nobody has asked for before."""
        return source.epoch not in self._waiting and self._has_room(record, source)

    def begin(self, record: RequestRecord, source: Replica) -> int:
        """One is on its way; with so many bytes, for ``end``."""
        num_bytes = kv_bytes(record, source)
        self._used[source.epoch] += 1
        self._num_bytes[source.epoch] += num_bytes
        return num_bytes

    def end(self, source: Replica, num_bytes: int) -> None:
        """It no longer is, whatever became of it."""
        self._used[source.epoch] -= 1
        self._num_bytes[source.epoch] -= num_bytes
        if not self._used[source.epoch]:
            del self._used[source.epoch], self._num_bytes[source.epoch]

    def wait(self, wish: Wish) -> None:
        """Have one wait; what was wished of the same request before is forgotten, and its place taken."""
        self._waiting.setdefault(wish.source.epoch, {})[wish.record.request_id] = wish

    def take(self) -> Wish | None:
        """The next one whose turn it is, on any replica; it waits no longer. A large one is overtaken by none."""
        for epoch, wishes in self._waiting.items():
            wish = next(iter(wishes.values()))
            if self._has_room(wish.record, wish.source):
                del wishes[wish.record.request_id]
                if not wishes:
                    del self._waiting[epoch]
                return wish
        return None

    def drop(self, *, source: Replica | None = None, cause: str | None = None) -> list[Wish]:
        """Forget what waits on a replica, or for this cause; returns it."""
        dropped: list[Wish] = []
        for epoch, wishes in list(self._waiting.items()):
            if source is None or epoch == source.epoch:
                mine = [wish for wish in wishes.values() if cause in (None, wish.cause)]
                dropped += mine
                for wish in mine:
                    del wishes[wish.record.request_id]
                if not wishes:
                    del self._waiting[epoch]
        return dropped

    def _has_room(self, record: RequestRecord, source: Replica) -> bool:
        if not self._used[source.epoch]:
            # It may have grown while it waited, and there is nobody left to wait for.
            return True
        fits = self._num_bytes[source.epoch] + kv_bytes(record, source) <= self._most_bytes
        return self._used[source.epoch] < self._most and fits


def kv_bytes(record: RequestRecord, source: Replica) -> int:
    """Of all that a request may have computed where it is, at most; 0 where that is not known."""
    if source.model is None:
        return 0
    size, prompt = source.model.block_size, len(record.prompt_token_ids)
    started = [sequence for sequence in record.unfinished.values() if sequence.started]
    num_blocks = sum(-(-(prompt + len(sequence.output_token_ids)) // size) for sequence in started)
    return num_blocks * source.model.block_bytes
