"""How many sequences may be unfinished at once, and what those are told that are one too many."""

from __future__ import annotations

from peft_dist.core.errors import InvalidRequestError, QueueFullError
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.pace import Pace
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable


class Room:
    """The bound of the queue: what the ready replicas run at once, and ``max_queue`` beyond."""

    def __init__(self, options: OrchestratorOptions, requests: RequestTable, replicas: ReplicaTable) -> None:
        self._options, self._requests, self._replicas = options, requests, replicas
        self._pace = Pace()
        self._num_unread = 0

    @property
    def num_held(self) -> int:
        """Sequences that wait or run, those that have ended and are not read, and those that have ended before their
        replica, which is not listening, took them in."""
        replicas = self._replicas.all_alive()
        ended = (each.num_sent - each.num_taken - self._requests.load(each) for each in replicas)
        return self._requests.num_sequences + self._num_unread + sum(number for number in ended if number > 0)

    @property
    def num_unread(self) -> int:
        """Sequences that have ended, and whose tokens are kept for a client that has not taken them."""
        return self._num_unread

    def keep_unread(self, change: int) -> None:
        """So many more of them, or fewer."""
        self._num_unread += change

    def check(self, num_new: int) -> None:
        """Raises InvalidRequestError or QueueFullError when so many new sequences are too many for ever, or now."""
        numbers = len(self._replicas.all()), len(self._replicas.ready())
        most, room = (number * self._options.max_num_seqs + self._options.max_queue for number in numbers)
        if num_new > most:
            raise InvalidRequestError(f"n={num_new} is more than the {most} sequences this server holds", "n")
        held = self.num_held
        excess = held + num_new - room
        if excess > 0:
            raise QueueFullError(
                f"The queue is full: {held} of {room} sequences wait, run or are not read. Try again later.",
                retry_after=self._pace.seconds_for(excess),
            )

    def ended(self, now: float) -> None:
        """A sequence ended."""
        self._pace.ended(now)
        if not self._requests.num_sequences:
            self._pace.idle()
