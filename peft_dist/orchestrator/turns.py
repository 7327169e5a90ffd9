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

    More at once are not there sooner: their copies stand behind each other's, and each may stand still meanwhile.
    """

    def __init__(self, most: int) -> None:
        """``most``: Requests on their way from one replica at once."""
        self._most = most
        self._used: Counter[int] = Counter()
        # In the order in which they were asked for, by incarnation and request.
        self._waiting: dict[int, dict[str, Wish]] = {}

    def may_begin(self, source: Replica) -> bool:
        """Whether one may leave that nobody has asked for before."""
        return source.epoch not in self._waiting and self._has_room(source.epoch)

    def begin(self, source: Replica) -> None:
        """One is on its way."""
        self._used[source.epoch] += 1

    def end(self, source: Replica) -> None:
        """It no longer is, whatever became of it."""
        self._used[source.epoch] -= 1
        if not self._used[source.epoch]:
            del self._used[source.epoch]

    def wait(self, wish: Wish) -> None:
        """Have one wait; what was wished of the same request before is forgotten, and its place taken."""
        self._waiting.setdefault(wish.source.epoch, {})[wish.record.request_id] = wish

    def take(self) -> Wish | None:
        """The next one whose turn it is, on any replica; it waits no longer."""
        for epoch, wishes in self._waiting.items():
            if self._has_room(epoch):
                wish = wishes.pop(next(iter(wishes)))
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

    def _has_room(self, epoch: int) -> bool:
        return self._used[epoch] < self._most


def kv_bytes(record: RequestRecord, source: Replica) -> int:
    """Of all that a request may have computed where it is, at most; 0 where that is not known."""
    if source.model is None:
        return 0
    size, prompt = source.model.block_size, len(record.prompt_token_ids)
    started = [sequence for sequence in record.unfinished.values() if sequence.started]
    num_blocks = sum(-(-(prompt + len(sequence.output_token_ids)) // size) for sequence in started)
    return num_blocks * source.model.block_bytes
