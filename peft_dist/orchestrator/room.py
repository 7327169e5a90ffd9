"""How many sequences may be unfinished at once, and what those are told that are one too many."""

from __future__ import annotations

from collections.abc import Callable

from peft_dist.core.errors import InvalidRequestError, QueueFullError
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.pace import Pace
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.orchestrator.untaken import most_bytes

UNTAKEN_BYTES = 256 << 20


class Room:
    """The bound of the queue: what the ready replicas run at once, and ``max_queue`` beyond.

    Attributes:
        refresh: Takes in what replicas have said, where somebody is late with it; called before anybody is refused.
    """

    def __init__(self, options: OrchestratorOptions, requests: RequestTable, replicas: ReplicaTable) -> None:
        self._options, self._requests, self._replicas = options, requests, replicas
        self._pace = Pace()
        self.refresh: Callable[[], None] | None = None
        self._num_unread = 0

    @property
    def num_held(self) -> int:
        """Sequences that wait or run, those that have ended and are not read, and those that have ended before their
        replica, which is not listening, took them in."""
        late = [each for each in self._replicas.all_alive() if each.num_sent != each.num_taken]
        ended = (each.num_sent - each.num_taken - self._requests.load(each) for each in late)
        return self._requests.num_sequences + self._num_unread + sum(number for number in ended if number > 0)

    @property
    def num_unread(self) -> int:
        """Sequences that have ended, and whose tokens are kept for a client that has not taken them."""
        return self._num_unread

    def keep_unread(self, change: int) -> None:
        """So many more of them, or fewer."""
        self._num_unread += change

    @property
    def untaken_bytes(self) -> int:
        """What is on its way to replicas, or stands in the sockets of those that do not listen: no more than that."""
        return sum([each.untaken.num_bytes for each in self._replicas.all_alive()])

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises InvalidRequestError or QueueFullError when another request is too much for ever, or now."""
        self.check_count(params.n, "n")
        self._check_bytes(params.n * most_bytes(len(prompt), params))

    def check_count(self, num_new: int, param: str) -> None:
        """As ``check``, of so many sequences, however long. ``param``: What asks for them."""
        numbers = len(self._replicas.all()), len(self._replicas.ready())
        most, room = (number * self._options.max_num_seqs + self._options.max_queue for number in numbers)
        if num_new > most:
            raise InvalidRequestError(
                f"{param} asks for {num_new} sequences, more than the {most} this server holds: send fewer at once",
                param,
            )
        held = self.num_held
        if held + num_new > room and self.refresh is not None:
            self.refresh()
            held = self.num_held
        excess = held + num_new - room
        if excess > 0:
            raise QueueFullError(
                f"The queue is full: {held} of {room} sequences wait, run or are not read. Try again later.",
                retry_after=self._pace.seconds_for(excess),
            )

    def _check_bytes(self, num_new: int) -> None:
        """What replicas have not taken in has a bound of its own: few sequences may be long."""
        held = self.untaken_bytes
        if held + num_new > UNTAKEN_BYTES and self.refresh is not None:
            self.refresh()
            held = self.untaken_bytes
        if held and held + num_new > UNTAKEN_BYTES:
            raise QueueFullError(
                f"The queue is full: replicas have not taken in {held / (1 << 20):.0f} MiB that they were sent. "
                "Try again later.",
                retry_after=self._pace.seconds_for(1),
            )

    def ended(self, now: float) -> None:
        """A sequence ended."""
        self._pace.ended(now)
        if not self._requests.num_sequences:
            self._pace.idle()
