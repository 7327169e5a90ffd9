"""Signs of life tell for how long the loop has been busy, from a thread of their own."""

from __future__ import annotations

import threading
from typing import Any

from peft_dist.core.messages import AnyReport, Heartbeat
from peft_dist.worker.heart import Heart


class Wire:
    """Takes the place of a channel, and of the sender that it makes."""

    def __init__(self) -> None:
        self.sent: list[AnyReport] = []
        self.threads: set[str] = set()
        self.heard = threading.Event()
        self.closed = False

    def sender(self) -> Any:
        return self

    def send(self, report: AnyReport) -> None:
        self.sent.append(report)
        self.threads.add(threading.current_thread().name)
        self.heard.set()

    def close(self) -> None:
        self.closed = True


def test_a_beat_tells_how_long_the_round_has_taken() -> None:
    now = [10.0]
    heart = Heart(Wire(), 1.0, clock=lambda: now[0])  # type: ignore[arg-type]
    assert heart.beat() == Heartbeat(busy_seconds=0.0)
    heart.begin_round()
    now[0] = 12.5
    assert heart.beat() == Heartbeat(busy_seconds=2.5)
    heart.begin_round()
    assert heart.beat() == Heartbeat(busy_seconds=0.0)
    now[0] = 20.0
    heart.rest()
    assert heart.beat() == Heartbeat(busy_seconds=0.0)


def test_it_beats_from_its_own_thread_until_it_is_stopped() -> None:
    wire = Wire()
    heart = Heart(wire, 0.001)  # type: ignore[arg-type]
    heart.start()
    assert wire.heard.wait(60)
    heart.stop()
    assert wire.closed and wire.threads == {"heart"}
    assert all(isinstance(report, Heartbeat) for report in wire.sent)
