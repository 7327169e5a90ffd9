"""Seconds of being overtaken: who collects them, who pays them back, and when that makes a request urgent."""

from __future__ import annotations

from peft_dist.policy.overtaking import OvertakingTracker
from tests.policy.queues import queue


def test_only_the_older_of_those_that_could_run_are_overtaken() -> None:
    tracker, candidates = OvertakingTracker(5.0), queue("abcd").candidates
    tracker.advance(0.0)
    tracker.ran([candidates[0], candidates[1], candidates[3]], [], {"b1"})
    tracker.advance(2.0)
    assert tracker.seconds("a0") == 2.0
    assert tracker.seconds("b1") == tracker.seconds("c2") == tracker.seconds("d3") == 0
    assert tracker.longest == 2.0


def test_seconds_wait_while_only_older_ones_run_and_shrink_while_running() -> None:
    tracker, candidates = OvertakingTracker(5.0), queue("abc").candidates
    for now, scheduled in [(0.0, {"c2"}), (3.0, {"a0"}), (4.0, {"b1"}), (5.0, {"c2"})]:
        tracker.advance(now)
        tracker.ran(candidates, [], scheduled)
    assert tracker.seconds("b1") == 2.0, "3 overtaken, then waiting, then 1 running"
    tracker.advance(9.0)
    assert tracker.seconds("b1") == 6.0 and tracker.seconds("c2") == 0.0


def test_urgent_from_one_step_before_the_bound_until_half_is_paid_back() -> None:
    tracker, candidates = OvertakingTracker(4.0), queue("ab").candidates
    tracker.advance(0.0)
    tracker.ran(candidates, [], {"b1"})
    tracker.advance(3.5)
    assert tracker.urgent(candidates, 0.4) == []
    urgent = tracker.urgent(candidates, 0.6)
    assert tracker.urgent(candidates, 0.5) == [], "up to the bound, not past it"
    assert urgent == [candidates[0]]
    for now in (3.5, 4.0, 4.9):
        tracker.advance(now)
        tracker.ran(candidates, urgent, {"a0"})
        assert tracker.urgent(candidates, 0.0) == [candidates[0]], now
    tracker.advance(5.0)
    assert tracker.urgent(candidates, 0.0) == []


def test_time_that_stands_still_or_goes_back_counts_nothing() -> None:
    tracker, candidates = OvertakingTracker(4.0), queue("ab").candidates
    tracker.advance(1.0)
    tracker.ran(candidates, [], {"b1"})
    tracker.advance(0.5)
    assert tracker.seconds("a0") == 0


def test_forgotten_requests_leave_nothing_behind() -> None:
    tracker, candidates = OvertakingTracker(1.0), queue("ab").candidates
    tracker.advance(0.0)
    tracker.ran(candidates, [candidates[0]], {"b1"})
    tracker.advance(3.0)
    tracker.forget(["a0", "b1", "never seen"])
    tracker.advance(4.0)
    assert tracker.longest == 0 and tracker.urgent(candidates, 0.0) == []


def test_running_is_not_saved_up() -> None:
    tracker, candidates = OvertakingTracker(5.0), queue("ab").candidates
    for now, scheduled in [(0.0, {"b1"}), (1.0, {"a0"}), (4.0, {"b1"}), (6.0, {"b1"})]:
        tracker.advance(now)
        tracker.ran(candidates, [], scheduled)
    assert tracker.seconds("a0") == 2.0


def test_the_longest_ever_outlives_its_request() -> None:
    tracker, candidates = OvertakingTracker(5.0), queue("abc").candidates
    tracker.advance(0.0)
    tracker.ran(candidates[:2], [], {"b1"})
    tracker.advance(3.0)
    tracker.forget(["a0"])
    tracker.ran(candidates[1:], [], {"c2"})
    tracker.advance(4.0)
    assert (tracker.longest, tracker.longest_ever) == (1.0, 3.0)
