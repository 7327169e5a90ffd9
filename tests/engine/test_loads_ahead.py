"""What a placement wishes for is loaded a few at a time: a load that a request waits for begins at once."""

from __future__ import annotations

from peft_dist.core.adapter import AdapterSpec
from peft_dist.engine.adapter_manager import MAX_LOADS_WITH_AHEAD, AdapterManager
from tests.engine.test_adapter_manager import spec_of

FEW = MAX_LOADS_WITH_AHEAD


def specs(count: int) -> list[AdapterSpec]:
    return [spec_of(str(number), m=4) for number in range(count)]


def names(content_hashes: list[str], of: list[AdapterSpec]) -> list[str]:
    by_hash = {spec.content_hash: spec.name for spec in of}
    return [by_hash[content_hash] for content_hash in content_hashes]


def bring(manager: AdapterManager, some: list[AdapterSpec]) -> None:
    """To the device, each for a request that has not run yet."""
    for spec in some:
        manager.add_user(spec)
    manager.want(some)
    for spec in some:
        manager.loaded(spec.content_hash)


def test_few_are_under_way_and_the_others_follow_in_order() -> None:
    some = specs(6)
    manager = AdapterManager(8)
    on_their_way = [manager.prefetch(spec) for spec in some]
    assert on_their_way == [True] * FEW + [False] * (len(some) - FEW)
    arrived = []
    while manager.loading:
        assert len(manager.loading) <= FEW
        key = manager.loading[0]
        manager.loaded(key)
        arrived.append(key)
        manager.check()
    assert names(arrived, some) == [spec.name for spec in some]


def test_a_load_that_a_request_waits_for_begins_at_once() -> None:
    *ahead, wanted = specs(7)
    manager = AdapterManager(8)
    for spec in ahead:
        manager.prefetch(spec)
    manager.add_user(wanted)
    manager.want([wanted])
    assert names(manager.loading, [*ahead, wanted])[-1] == wanted.name and len(manager.loading) == FEW + 1
    # And so does that of one that was wished for, which then is loaded once.
    manager.add_user(ahead[-1])
    manager.want([ahead[-1]])
    assert len(manager.loading) == FEW + 2
    while manager.loading:
        manager.loaded(manager.loading[0])
    assert manager.loads == len(ahead) + 1 and len(manager.resident) == len(ahead) + 1


def test_nothing_leaves_before_its_room_is_needed() -> None:
    old, new = specs(8)[:4], specs(8)[4:]
    manager = AdapterManager(4)
    bring(manager, old)
    for spec in old:
        manager.remove_user(spec)
    for spec in new:
        manager.prefetch(spec)
    assert len(manager.resident) == len(old) - FEW, "the rest may still be asked for"
    manager.loaded(manager.loading[0])
    assert len(manager.resident) == len(old) - FEW, "one came, one more left"
    manager.check()


def test_one_that_failed_or_is_forgotten_holds_up_no_other() -> None:
    some = specs(5)
    manager = AdapterManager(8)
    for spec in some:
        manager.prefetch(spec)
    manager.forget(some[3].content_hash)
    manager.load_failed(some[0].content_hash, "the disk is gone")
    manager.loaded(some[1].content_hash)
    assert names(manager.loading, some) == ["2", "4"]


def test_wishes_wait_while_a_request_does() -> None:
    *ahead, wanted = specs(4)
    manager = AdapterManager(FEW + 2)
    for spec in ahead:
        manager.prefetch(spec)
    manager.add_user(wanted)
    for spec in ahead[:FEW]:
        manager.loaded(spec.content_hash)
    assert not manager.loading, "the request that has just come may need this room"
    manager.want([wanted])
    assert names(manager.loading, [wanted]) == [wanted.name]
    manager.loaded(wanted.content_hash)
    assert names(manager.loading, ahead) == ["2"], "it has what it waited for"
    manager.loaded(manager.loading[0])
    assert wanted.content_hash in manager.resident
    manager.check()


def test_no_wish_takes_the_room_of_another() -> None:
    """As many as there is room for, the first ones: those that have come meanwhile are idle, and older."""
    running, wished = specs(14)[:4], specs(14)[4:]
    manager = AdapterManager(10)
    bring(manager, running)
    for spec in running:
        manager.acquire(spec)
    for spec in wished:
        manager.prefetch(spec)
    while manager.loading:
        manager.loaded(manager.loading[0])
    assert manager.evictions == 0 and names(manager.resident[4:], wished) == [spec.name for spec in wished[:6]]
    # What is wished for later may: the placement is another one then.
    manager.prefetch(wished[8])
    assert names(manager.loading, wished) == [wished[8].name] and manager.evictions == 1
    manager.check()


def test_a_wish_is_passed_over_when_what_was_pinned_waits_no_more() -> None:
    *ahead, pinned = specs(4)
    manager = AdapterManager(FEW)
    for spec in ahead:
        manager.prefetch(spec)
    manager.pin("name", pinned)
    for spec in ahead[:FEW]:
        manager.loaded(spec.content_hash)
    assert names(manager.loading, ahead) == []
    manager.unpin("name")
    assert not manager.loading, "its wish had room but in place of what came with it, and is passed over"
    manager.prefetch(ahead[2])
    assert names(manager.loading, ahead) == ["2"]
