"""Calls in the background: every end is told once, limits hold, and stuck threads hold nobody up."""

from __future__ import annotations

import select
import threading
import weakref

import pytest

from peft_dist.runner.background import BackgroundCalls, Call, Ended, TimeLimitError


def wait_for(calls: BackgroundCalls[str, object], count: int) -> dict[str, Ended[str, object]]:
    ended: dict[str, Ended[str, object]] = {}
    while len(ended) < count:
        assert select.select([calls.fileno()], [], [], 60)[0], "nothing ended"
        taken = calls.take()
        assert taken, "readable, but there was nothing"
        ended.update({one.key: one for one in taken})
    return ended


def fail(error: BaseException) -> object:
    raise error


def test_results_and_errors_of_many_calls_arrive_once() -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("test", 3)
    assert calls.take() == [] and not select.select([calls.fileno()], [], [], 0)[0]
    for number in range(50):
        calls.start(
            str(number), (lambda call, n=number: n) if number % 5 else lambda call: fail(MemoryError("no room"))
        )
    ended = wait_for(calls, 50)
    for number in range(50):
        one = ended[str(number)]
        if number % 5:
            assert (one.result, one.error) == (number, None) and one.seconds >= 0
        else:
            assert isinstance(one.error, MemoryError)
    assert calls.take() == [] and not select.select([calls.fileno()], [], [], 0)[0]
    calls.close()


def test_a_call_waits_for_none_of_another_lane() -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("test", 1, num_lanes=2)
    release = threading.Event()
    calls.start("long", lambda call: release.wait(60))
    calls.start("behind it", lambda call: 1)
    calls.start("beside it", lambda call: 2, lane=1)
    assert wait_for(calls, 1).keys() == {"beside it"}
    release.set()
    assert wait_for(calls, 2).keys() == {"long", "behind it"}
    calls.close()


def test_a_stuck_call_is_replaced_in_its_lane() -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("test", 1, time_limit=0.3, num_lanes=2)
    release = threading.Event()
    calls.start("stuck", lambda call: release.wait(60), lane=1)
    assert isinstance(wait_for(calls, 1)["stuck"].error, TimeLimitError)
    calls.start("next", lambda call: 1, lane=1)
    assert wait_for(calls, 1)["next"].result == 1
    release.set()
    calls.close()


def test_a_stuck_call_is_ended_and_its_thread_replaced() -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("test", 1, time_limit=0.3)
    release, came_back = threading.Event(), threading.Event()

    def stuck(call: Call) -> None:
        release.wait()
        try:
            call.commit()
        except TimeLimitError:
            came_back.set()
            raise

    calls.start("stuck", stuck)
    assert isinstance(wait_for(calls, 1)["stuck"].error, TimeLimitError)
    # Of the thread that takes its place.
    calls._time_limit = None
    calls.start("next", lambda call: 7)
    assert wait_for(calls, 1)["next"].result == 7
    release.set()
    assert came_back.wait(60), "whatever has passed its limit must not take effect"
    calls.start("last", lambda call: 8)
    assert wait_for(calls, 1)["last"].result == 8
    calls.close()


def test_time_spent_in_the_queue_does_not_count() -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("test", 1, time_limit=2.0)
    gate = threading.Event()

    def long(call: Call) -> None:
        # Its own limit ends here.
        call.commit()
        gate.wait(2.5)

    calls.start("long", long)
    calls.start("next", lambda call: 7)
    assert all(one.error is None for one in wait_for(calls, 2).values())
    calls.close()


def test_the_limit_ends_with_the_commit() -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("test", 1, time_limit=2.0)
    gate = threading.Event()

    def work(call: Call) -> str:
        call.commit()
        gate.wait(2.5)
        return "done"

    calls.start("committed", work)
    assert wait_for(calls, 1)["committed"].result == "done"
    calls.close()


def test_closing_does_not_wait_and_threads_keep_nothing_alive() -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("closing", 2, time_limit=60)
    release, entered = threading.Event(), threading.Event()

    class Big:
        pass

    big = Big()
    gone = threading.Event()
    kept = weakref.ref(big, lambda _: gone.set())
    calls.start("big", lambda call, big=big: None)
    wait_for(calls, 1)
    del big

    def stuck(call: Call) -> None:
        entered.set()
        release.wait()

    calls.start("stuck", stuck)
    assert entered.wait(60)
    # The call has ended before its thread lets go of it.
    assert gone.wait(60) and kept() is None
    calls.close()
    calls.close()
    release.set()
    for thread in threading.enumerate():
        if thread.name == "closing":
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError()])
def test_errors_are_handed_over_whatever_they_are(error: Exception) -> None:
    calls: BackgroundCalls[str, object] = BackgroundCalls("test", 1)
    calls.start("bad", lambda call: fail(error))
    assert wait_for(calls, 1)["bad"].error is error
    calls.close()
