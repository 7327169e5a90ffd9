"""Numbers of the messages from one side to the other, by which it is noticed that one did not arrive.

A TCP connection that is reset takes with it what was under way, and the next one begins with what was sent later. Each
side numbers what it sends to the other, within an incarnation of a replica, from 1; what belongs to no such order has
the number 0, and is lost without harm.
"""

from __future__ import annotations

UNNUMBERED = 0


class Outbox:
    """Counts what one side sends."""

    def __init__(self) -> None:
        self.last = UNNUMBERED

    def next(self) -> int:
        """The number of one more message."""
        self.last += 1
        return self.last


class Inbox:
    """Lets each message of the other side in once, in order, up to the first one that is missing.

    Attributes:
        last: The number of the last one that was let in.
        missing: Numbers, from the first to the last, that were passed over; None while there are none. Nothing behind
            them is let in, for it was meant for somebody who knew them.
    """

    def __init__(self) -> None:
        self.last = UNNUMBERED
        self.missing: tuple[int, int] | None = None

    def take(self, number: int) -> bool:
        """Whether the message of this number is to be taken in."""
        if number == self.last + 1 and self.missing is None:
            self.last = number
            return True
        if number > self.last + 1 and self.missing is None:
            self.missing = self.last + 1, number - 1
        return number == UNNUMBERED
