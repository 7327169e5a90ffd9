"""Pins: loaded without a request, never put out, and refused where they would leave no room for others."""

from __future__ import annotations

import pytest

from peft_dist.core.errors import AdapterError
from peft_dist.engine.adapter_manager import AdapterManager
from tests.engine.test_adapter_manager import load, settle, spec_of


def test_a_pin_loads_at_once_and_takes_the_room_of_those_that_nobody_uses_first() -> None:
    used, unused, pinned, last = (spec_of(name) for name in ("used", "unused", "pinned", "last"))
    manager = AdapterManager(2)
    load(manager, used, unused)
    manager.add_user(used)
    manager.pin("pinned", pinned)
    assert manager.loading == [pinned.content_hash] and manager.resident == [used.content_hash]
    manager.loaded(pinned.content_hash)
    manager.want([last])
    settle(manager)
    manager.want([used])
    assert set(manager.resident) == {pinned.content_hash}, "what requests need goes round in the other slot"
    settle(manager)
    manager.pin("pinned", unused)
    settle(manager)
    assert set(manager.resident) == {used.content_hash, unused.content_hash}, "the name pins something else now"


def test_a_pin_that_finds_all_room_under_way_is_met_when_a_load_has_ended() -> None:
    a, b, pinned = (spec_of(name) for name in ("a", "b", "pinned"))
    manager = AdapterManager(2)
    manager.want([a, b])
    manager.pin("pinned", pinned)
    assert manager.loading == [a.content_hash, b.content_hash]
    manager.loaded(a.content_hash)
    manager.want_pinned()
    assert manager.loading == [b.content_hash, pinned.content_hash]


def test_a_pin_whose_load_fails_is_not_tried_again_by_itself() -> None:
    pinned = spec_of("pinned")
    manager = AdapterManager(2)
    manager.pin("pinned", pinned)
    manager.load_failed(pinned.content_hash, "the disk is gone")
    manager.want_pinned()
    assert manager.loading == []
    load(manager, pinned)
    assert pinned.content_hash in manager.pins, "a request brought it, and there it stays"


def test_one_content_under_two_names_is_pinned_until_both_are_unpinned() -> None:
    a, other = spec_of("a"), spec_of("other")
    manager = AdapterManager(1)
    load(manager, a)
    manager.pin("one", a)
    manager.pin("two", a)
    manager.unpin("one")
    manager.want([other])
    assert manager.loading == []
    manager.unpin("two")
    manager.want([other])
    assert manager.loading == [other.content_hash]


def test_pins_that_leave_no_slot_or_page_are_refused_in_words() -> None:
    manager = AdapterManager(3, 4, 64)
    narrow, wide, big = spec_of("narrow", q=8), spec_of("wide", q=4, v=8), spec_of("big", q=56)
    manager.check_room(narrow, [], pinned=True)
    manager.pin("narrow", narrow)
    with pytest.raises(AdapterError, match=r"'wide' cannot be pinned: adapter 'big' has rank 56 in q, .* take 3: "):
        manager.check_room(wide, [big], pinned=True)
    manager.check_room(wide, [spec_of("fits", q=52)], pinned=False)
    manager.pin("wide", wide)
    with pytest.raises(AdapterError, match=r"'third' cannot be pinned: 3 pinned adapters leave none of the 3 slots"):
        manager.check_room(spec_of("third"), [], pinned=True)
    with pytest.raises(AdapterError, match=r"'wide' cannot be pinned: 2 .* none of the 16 pages of 4 rank rows in v"):
        manager.pins.check_pin("wide", spec_of("full", v=64), [])
    with pytest.raises(AdapterError, match=r"'big' has rank 56 in q, .* of which pinned adapters take 3: "):
        manager.check_room(big, [], pinned=False)
    manager.unpin("wide")
    manager.check_room(spec_of("fits", q=56), [], pinned=False)
    # It takes the place of what the name pins.
    manager.check_room(spec_of("narrow", q=60), [], pinned=True)


def test_a_pin_takes_the_room_of_an_adapter_in_use_where_all_are() -> None:
    a, b, pinned = (spec_of(name) for name in ("a", "b", "pinned"))
    manager = AdapterManager(2)
    load(manager, a, b)
    for spec in (a, b):
        manager.add_user(spec)
    manager.pin("pinned", pinned)
    assert manager.loading == [pinned.content_hash] and manager.resident == [b.content_hash]
    assert manager.take_keeps() == [a.content_hash], "its requests go on with the weights they have begun with"
