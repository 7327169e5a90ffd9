"""Signs of life, from a thread that goes on while a step or a load keeps the loop busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from peft_dist.core.messages import Heartbeat
from peft_dist.worker.channel import Channel


class Heart:
    """Sends a ``Heartbeat`` every so often. A stopped process sends none, and a loop that is stuck is told of."""

    def __init__(self, channel: Channel, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``seconds``: Between two beats. ``clock``: Seconds from any origin, never running backwards."""
        self._channel = channel
        self._seconds = seconds
        self._clock = clock
        self._round_began: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; before its channel is closed."""
        self._stopped.set()
        self._thread.join()

    def begin_round(self) -> None:
        """The loop has something to do from now on, until its next round or rest."""
        self._round_began = self._clock()

    def rest(self) -> None:
        """The loop waits for commands."""
        self._round_began = None

    def beat(self) -> Heartbeat:
        """The sign of life of this moment."""
        began = self._round_began
        return Heartbeat(busy_seconds=0.0 if began is None else max(self._clock() - began, 0.0))

    def _run(self) -> None:
        sender = self._channel.sender()
        while not self._stopped.wait(self._seconds):
            sender.send(self.beat())
        sender.close()
