"""Whatever is lost on the way is missed, or was of no matter."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from peft_dist.core.numbering import UNNUMBERED, Inbox, Outbox


def numbered(count: int) -> list[int]:
    outbox = Outbox()
    return [outbox.next() for _ in range(count)]


@given(lost=st.lists(st.booleans(), max_size=30))
def test_any_loss_is_noticed_by_the_next_message_or_is_at_the_end(lost: list[bool]) -> None:
    inbox = Inbox()
    taken = [number for number, gone in zip(numbered(len(lost)), lost, strict=True) if not gone and inbox.take(number)]
    first = lost.index(True) if True in lost else len(lost)
    # All before the first loss, and nothing behind it.
    assert taken == list(range(1, first + 1))
    assert (inbox.missing is None) == (False not in lost[first:])


@given(lost=st.lists(st.booleans(), max_size=20), later=st.integers(1, 3))
def test_what_comes_later_shows_a_loss_at_the_end(lost: list[bool], later: int) -> None:
    inbox = Inbox()
    numbers = numbered(len(lost) + later)
    for number, gone in zip(numbers, [*lost, *[False] * later], strict=True):
        if not gone:
            inbox.take(number)
    assert (inbox.missing is not None) == (True in lost)


@given(data=st.data(), count=st.integers(0, 12))
def test_nothing_is_taken_twice_or_out_of_order_whatever_the_connections_do(data: st.DataObject, count: int) -> None:
    """Any numbers, any number of times, in any order."""
    arrived = data.draw(st.lists(st.integers(UNNUMBERED, count + 1), max_size=40))
    inbox = Inbox()
    taken = [number for number in arrived if inbox.take(number) and number != UNNUMBERED]
    assert taken == list(range(1, len(taken) + 1)) and inbox.last == len(taken)
    if inbox.missing is None:
        # Nothing was passed over: all that arrived has been taken.
        assert set(arrived) - {UNNUMBERED} == set(taken)
    else:
        first, last = inbox.missing
        assert first == len(taken) + 1 <= last and last + 1 in arrived


@given(numbers=st.lists(st.integers(1, 5), max_size=10))
def test_what_belongs_to_no_order_is_always_taken(numbers: list[int]) -> None:
    inbox = Inbox()
    for number in numbers:
        inbox.take(number)
        assert inbox.take(UNNUMBERED)
