"""Signs of life, from a thread that goes on while a step or a load keeps the loop busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from peft_dist.core.messages import Heartbeat
from peft_dist.worker.channel import Channel
from peft_dist.worker.vigil import Vigil

# A new orchestrator learns of an orphan by its beats.
_ORPHANS_SECONDS = 0.25


class Heart:
    """Sends a ``Heartbeat`` every so often. A stopped process sends none, and a loop that is stuck is told of.

    Attributes:
        missed: As in ``Heartbeat``.
        is_whole: Whether all that belongs to this replica is alive, asked before each beat: else it sends none.
    """

    def __init__(
        self,
        channel: Channel,
        seconds: float,
        vigil: Vigil | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``seconds``: Between two beats. ``clock``: Seconds from any origin, never running backwards."""
        self._channel = channel
        self._seconds = seconds
        self._vigil = vigil
        self._clock = clock
        self._round_began: float | None = None
        self.missed: tuple[int, int] | None = None
        self.is_whole: Callable[[], bool] = lambda: True
        self._stopped = False
        self._due = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; before its channel is closed or renamed. It can be started again."""
        if self._thread is not None:
            self._stopped = True
            self._due.set()
            self._thread.join()
            self._thread = None

    def set_pace(self, seconds: float) -> None:
        """Between two beats from now on; while it is stopped."""
        self._seconds = seconds

    def hurry(self) -> None:
        """Beat now. From any thread."""
        self._due.set()

    def begin_round(self) -> None:
        """The loop has something to do from now on, until its next round or rest."""
        self._round_began = self._clock()

    def rest(self) -> None:
        """The loop waits for commands."""
        self._round_began = None

    def beat(self) -> Heartbeat:
        """The sign of life of this moment."""
        began = self._round_began
        busy = 0.0 if began is None else max(self._clock() - began, 0.0)
        return Heartbeat(busy_seconds=busy, is_orphaned=self._is_orphaned, missed=self.missed)

    @property
    def _is_orphaned(self) -> bool:
        return self._vigil is not None and self._vigil.is_orphaned

    def _run(self) -> None:
        sender = self._channel.sender()
        while True:
            self._due.wait(min(self._seconds, _ORPHANS_SECONDS) if self._is_orphaned else self._seconds)
            self._due.clear()
            if self._stopped:
                break
            if self.is_whole():
                sender.send(self.beat())
        sender.close()
