"""Host copies: the budget holds, the least recently used leave, and nothing in use does."""

from __future__ import annotations

import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_tensors import LoadedAdapter, ModuleWeights
from peft_dist.runner.host_tier import HostTier


def adapter_of(name: str, num_bytes: int) -> LoadedAdapter:
    weights = {"q": ModuleWeights(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)}
    return LoadedAdapter(AdapterSpec(name, name, "", {"q": 1}, num_bytes), weights)


def fetch(tier: HostTier, adapter: LoadedAdapter) -> bool:
    """Whether it had to be read."""
    read = []

    def from_disk() -> LoadedAdapter:
        read.append(adapter)
        return adapter

    with tier.hold(adapter.spec, from_disk) as copy:
        assert copy.spec == adapter.spec
    return bool(read)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40), st.integers(0, 30))
def test_copies_are_the_last_used_ones_that_fit(history: list[tuple[int, bool]], capacity: int) -> None:
    tier = HostTier(capacity)
    adapters = [adapter_of(str(i), 3 + 2 * i) for i in range(6)]
    expected: list[int] = []
    for number, remove in history:
        if remove:
            tier.remove(str(number))
            expected = [n for n in expected if n != number]
        else:
            assert fetch(tier, adapters[number]) == (number not in expected)
            if 3 + 2 * number <= capacity:
                expected = [n for n in expected if n != number] + [number]
            while sum(3 + 2 * n for n in expected) > capacity:
                expected.pop(0)
        assert [spec.name for spec in tier.specs] == [str(n) for n in expected]
        assert tier.num_bytes == sum(3 + 2 * n for n in expected) <= capacity


def test_what_is_being_copied_stays_and_what_was_removed_meanwhile_goes() -> None:
    tier = HostTier(10)
    first, second = adapter_of("first", 10), adapter_of("second", 10)
    with tier.hold(first.spec, lambda: first):
        assert fetch(tier, second)
        assert [spec.name for spec in tier.specs] == ["first"], "second was the only one that could go"
        tier.remove("first")
    assert tier.specs == [] and tier.num_bytes == 0


def test_what_is_kept_stays_beyond_the_budget_until_it_is_released() -> None:
    tier = HostTier(10)
    first, second = adapter_of("first", 10), adapter_of("second", 10)
    assert not tier.keep("first")
    assert tier.keep("first", first) and tier.num_bytes == 0 and tier.specs == [first.spec]
    assert fetch(tier, second) and not fetch(tier, first)
    assert tier.keep("second") and tier.num_bytes == 10 and tier.specs == [second.spec, first.spec]
    assert fetch(tier, adapter_of("third", 10)) and not fetch(tier, second)
    tier.release("first")
    tier.release("second")
    assert [spec.name for spec in tier.specs] == ["third"]
    assert fetch(tier, first) and fetch(tier, second)


def test_a_failing_read_leaves_nothing() -> None:
    tier = HostTier(10)
    adapter = adapter_of("a", 4)

    def broken() -> LoadedAdapter:
        raise AdapterError("gone")

    with pytest.raises(AdapterError), tier.hold(adapter.spec, broken):
        pass
    assert tier.specs == [] and not tier._in_use
    assert fetch(tier, adapter) and not fetch(tier, adapter)
    assert (tier.hits, tier.misses) == (1, 2)


def test_many_threads() -> None:
    tier = HostTier(12)
    adapters = [adapter_of(str(i), 3) for i in range(8)]

    def work(seed: int) -> None:
        for step in range(300):
            fetch(tier, adapters[(seed * step + step // 3) % 8])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tier.num_bytes <= 12 and not tier._in_use and tier.hits + tier.misses == 1200
