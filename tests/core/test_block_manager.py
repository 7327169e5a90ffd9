"""Blocks are owned exactly as often as they are counted, and ``check`` notices when they are not."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from peft_dist.core.block_hash import chain_hashes
from peft_dist.core.block_manager import BlockManager

BLOCK = 4


class Blocks(RuleBasedStateMachine):
    """Random sequences over few blocks; each remembers the hash chain that it stands for."""

    @initialize(blocks=st.integers(1, 12), host=st.integers(0, 8))
    def start(self, blocks: int, host: int) -> None:
        self.manager = BlockManager(blocks, BLOCK, host)
        self.lengths: dict[str, int] = {}
        self.swapped: set[str] = set()
        self.counter = 0

    def chain(self, kind: int, count: int) -> list[bytes]:
        keys, parent = [], str(kind).encode()
        for _ in range(count):
            parent = chain_hashes(parent, [kind] * BLOCK, BLOCK)[0]
            keys.append(parent)
        return keys

    @rule(kind=st.integers(0, 2), tokens=st.integers(1, 30))
    def allocate(self, kind: int, tokens: int) -> None:
        full = tokens // BLOCK
        prefix = self.manager.find_prefix(self.chain(kind, full))[: (tokens - 1) // BLOCK]
        free = self.manager.num_free
        self.counter += 1
        name = f"s{self.counter}"
        if not self.manager.allocate(name, prefix, tokens):
            assert self.manager.num_free == free
            return
        table = self.manager.table(name)
        assert table[: len(prefix)] == prefix and len(table) == -(-tokens // BLOCK) and len(set(table)) == len(table)
        self.lengths[name] = tokens
        for index, key in enumerate(self.chain(kind, full)):
            self.manager.publish(name, index, key)

    @rule(pick=st.integers(0, 99), more=st.integers(1, 9))
    def grow(self, pick: int, more: int) -> None:
        names = sorted(self.lengths.keys() - self.swapped)
        if names:
            name = names[pick % len(names)]
            if self.manager.grow(name, self.lengths[name] + more):
                self.lengths[name] += more
            assert len(self.manager.table(name)) == self.manager.blocks_for(self.lengths[name])

    @rule(pick=st.integers(0, 99))
    def free(self, pick: int) -> None:
        if self.lengths:
            name = sorted(self.lengths)[pick % len(self.lengths)]
            self.manager.free(name)
            del self.lengths[name]
            self.swapped.discard(name)

    @rule(pick=st.integers(0, 99))
    def swap(self, pick: int) -> None:
        if not self.lengths:
            return
        name = sorted(self.lengths)[pick % len(self.lengths)]
        if name in self.swapped:
            if self.manager.swap_in(name, self.lengths[name]) is not None:
                self.swapped.discard(name)
        elif (copies := self.manager.swap_out(name)) is not None:
            assert len(copies) == self.manager.blocks_for(self.lengths[name])
            self.swapped.add(name)

    @rule(kind=st.integers(0, 2))
    def withdraw(self, kind: int) -> None:
        self.manager.withdraw(self.chain(kind, 12))
        assert self.manager.find_prefix(self.chain(kind, 12)) == []

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check()


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, deadline=None, stateful_step_count=30)


@pytest.mark.parametrize(
    "damage",
    [
        lambda manager: manager._refs.__setitem__(0, 5),
        lambda manager: manager._blank.pop(),
        lambda manager: manager.tables["a"].append(manager.tables["a"][0]),
        lambda manager: manager._free_host.append(0),
        lambda manager: manager._hash_of.__setitem__(1, b"nobody's"),
        lambda manager: manager._host_tables.__setitem__("a", []),
    ],
)
def test_check_notices_damage(damage) -> None:
    manager = BlockManager(6, BLOCK, 2)
    assert manager.allocate("a", [], 9)
    manager.check()
    damage(manager)
    with pytest.raises(AssertionError):
        manager.check()


def test_cached_blocks_are_taken_last_and_oldest_first() -> None:
    manager = BlockManager(4, BLOCK)
    for name in ("x", "y"):
        assert manager.allocate(name, [], BLOCK)
        manager.publish(name, 0, name.encode())
        manager.free(name)
    assert manager.allocate("z", [], 2 * BLOCK)
    assert manager.find_prefix([b"x"]) and manager.find_prefix([b"y"])
    assert manager.grow("z", 3 * BLOCK)
    assert not manager.find_prefix([b"x"]) and manager.find_prefix([b"y"])


def test_a_table_that_was_given_out_stays_as_it_is() -> None:
    manager = BlockManager(8, 4)
    assert manager.allocate("a", [], 4)
    first = manager.table("a")
    before = list(first)
    assert manager.grow("a", 5) and manager.grow("a", 16)
    assert first == before == manager.table("a")[:1] and len(manager.table("a")) == 4
    manager.free("a")
    assert first == before
    manager.check()
