"""How many sequences may be unfinished at once, and what those are told that are one too many."""

from __future__ import annotations

from peft_dist.core.errors import InvalidRequestError, QueueFullError
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.pace import Pace


class Room:
    """The bound of the queue: what the ready replicas run at once, and ``max_queue`` beyond."""

    def __init__(self, options: OrchestratorOptions) -> None:
        self._options = options
        self._pace = Pace()

    def check(self, num_new: int, num_unfinished: int, num_ready: int, num_replicas: int) -> None:
        """Raises InvalidRequestError or QueueFullError when so many new sequences are too many for ever, or now."""
        most, room = (n * self._options.max_num_seqs + self._options.max_queue for n in (num_replicas, num_ready))
        if num_new > most:
            raise InvalidRequestError(f"n={num_new} is more than the {most} sequences this server holds", "n")
        excess = num_unfinished + num_new - room
        if excess > 0:
            raise QueueFullError(
                f"The queue is full: {num_unfinished} of {room} sequences wait or run. Try again later.",
                retry_after=self._pace.seconds_for(excess),
            )

    def ended(self, now: float, num_left: int) -> None:
        """A sequence ended, and so many are left."""
        self._pace.ended(now)
        if not num_left:
            self._pace.idle()
