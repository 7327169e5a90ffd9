"""How long a refused client is asked to wait."""

from __future__ import annotations

from peft_dist.orchestrator.pace import Pace


def test_nothing_known_means_a_second() -> None:
    assert Pace().seconds_for(100) == 1.0


def test_the_wait_grows_with_what_must_end_first_within_bounds() -> None:
    pace = Pace()
    for at in range(0, 50, 5):
        pace.ended(float(at))
    assert pace.seconds_for(3) == 15.0
    assert pace.seconds_for(1000) == 60.0
    assert pace.seconds_for(0) == 1.0


def test_idle_time_does_not_count() -> None:
    pace = Pace()
    pace.ended(0.0)
    pace.ended(2.0)
    pace.idle()
    pace.ended(10_000.0)
    pace.ended(10_002.0)
    assert pace.seconds_for(5) == 10.0
