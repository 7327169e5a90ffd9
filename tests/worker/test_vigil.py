"""When a worker finds that its orchestrator is gone, and what ends its waiting for another one."""

from __future__ import annotations

import select
import threading

from peft_dist.worker.vigil import Vigil


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def readable(vigil: Vigil) -> bool:
    return bool(select.select([vigil.fileno()], [], [], 0)[0])


def test_silence_counts_from_the_last_word_and_is_told_once() -> None:
    clock, lost = Clock(), []
    vigil = Vigil(10.0, 60.0, end=lambda: None, clock=clock)
    vigil.on_loss = lambda: lost.append(clock.now)
    clock.now += 9.0
    assert not vigil.check() and vigil.timeout_ms() == 1000
    vigil.hear()
    clock.now += 9.5
    assert not vigil.check() and not vigil.is_orphaned and vigil.timeout_ms() == 500
    clock.now += 0.5
    assert vigil.check() and vigil.is_orphaned and lost == [clock.now]
    # What comes too late changes nothing: others may have its requests.
    vigil.hear()
    assert not vigil.check() and vigil.is_orphaned and vigil.timeout_ms() is None and not readable(vigil)
    vigil.close()


def test_without_a_limit_silence_means_nothing() -> None:
    clock = Clock()
    vigil = Vigil(None, 60.0, end=lambda: None, clock=clock)
    clock.now += 1e6
    assert not vigil.check() and vigil.timeout_ms() is None
    vigil.lose(vigil.generation, "gone")
    assert readable(vigil), "whoever waits for commands is woken"
    assert vigil.check() and not readable(vigil)
    vigil.close()


def test_an_orphan_ends_unless_it_is_adopted_and_an_earlier_end_is_no_news() -> None:
    ended = threading.Event()
    vigil = Vigil(None, 0.01, end=ended.set)
    first = vigil.generation
    vigil.lose(first, "gone")
    assert ended.wait(60)
    ended.clear()
    second = vigil.adopted()
    vigil.lose(first, "gone, said a thread that was late")
    assert not vigil.is_orphaned and not vigil.check()
    vigil.lose(second, "gone")
    assert vigil.is_orphaned and ended.wait(60)
    vigil.close()


def test_adoption_comes_in_time() -> None:
    ended = threading.Event()
    vigil = Vigil(None, 20.0, end=ended.set)
    vigil.lose(0, "gone")
    timer = vigil._timer
    assert timer is not None
    vigil.adopted()
    assert not vigil.check() and not readable(vigil), "there is nothing to tell any more"
    timer.join(10.0)
    assert not timer.is_alive() and not ended.is_set()
    vigil.close()


def test_silence_of_one_whose_end_would_be_told_ends_requests_and_not_the_worker() -> None:
    clock, ended, lost = Clock(), threading.Event(), []
    vigil = Vigil(10.0, 0.01, end=ended.set, clock=clock, is_watched=True)
    vigil.on_loss = lambda: lost.append(clock.now)
    clock.now += 10.0
    assert vigil.check() and vigil.is_orphaned and not vigil.check() and not readable(vigil)
    # It is heard again, and has to say what this worker is from now on.
    vigil.hear()
    assert vigil.is_orphaned and vigil.timeout_ms() is None and not vigil.check()
    assert not ended.wait(0.2), "it is there, and may take a long time"
    second = vigil.adopted()
    assert not vigil.is_orphaned and vigil.timeout_ms() == 10_000 and len(lost) == 1
    clock.now += 10.0
    assert readable(vigil) is False and vigil.check()
    vigil.lose(second, "gone")
    assert readable(vigil) and vigil.check() and ended.wait(60) and len(lost) == 3
    vigil.close()


def test_without_time_to_wait_it_ends_with_its_orchestrator_and_not_with_an_earlier_one() -> None:
    ended = threading.Event()
    vigil = Vigil(10.0, None, end=ended.set, is_watched=True)
    second = vigil.adopted()
    vigil.lose(second - 1, "gone, said a thread that was late")
    assert not ended.is_set()
    vigil.lose(second, "gone")
    assert ended.is_set()
    vigil.close()
