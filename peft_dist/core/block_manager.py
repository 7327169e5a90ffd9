"""Who owns which KV block."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Owns the free KV blocks of a replica and every block table.

    Full blocks may be published under a hash; a freed block keeps its hash until it is needed again, so
    that a later prompt with the same prefix finds it (least recently freed goes first). Blocks of one
    published prefix are shared by counting references; nobody writes into a shared block because only full
    blocks are published.

    Tables are lists of block ids in order of position. A sequence's blocks are either on the device or,
    after ``swap_out``, on the host.

    Attributes:
        tables: Of sequences on the device. No list of them is ever changed: a batch may keep what it was given.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._had_names = False
        # Without a name, which are of no use to anybody and go first, the last freed before all others; and those that
        # had one when they were freed.
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._free_host = list(range(num_host_blocks))
        self.tables: dict[str, list[int]] = {}
        self._host_tables: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Device blocks that can be given out, cached prefixes that nobody uses included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_swapped(self) -> int:
        """Sequences whose blocks are on the host."""
        return len(self._host_tables)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def table(self, request_id: str) -> list[int]:
        """Numbers of the request's device blocks, in the order of its tokens; not to be changed."""
        return self.tables[request_id]

    def blocks_of(self, request_id: str, num_tokens: int) -> tuple[list[int], bool]:
        """Numbers of the blocks of a sequence's first tokens, and whether they are the host's."""
        needed = self.blocks_for(num_tokens)
        if request_id in self.tables:
            return self.tables[request_id][:needed], False
        return self._host_tables.get(request_id, [])[:needed], True

    def find_prefix(self, hashes: list[bytes]) -> list[int]:
        """Blocks of the longest published prefix of this hash chain."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, request_id: str, prefix: list[int], num_tokens: int) -> bool:
        """Give a new sequence the shared ``prefix`` blocks and fresh ones up to ``num_tokens``.

        Changes nothing and returns False when too few blocks are free.
        """
        assert request_id not in self.tables and request_id not in self._host_tables
        fresh = self.blocks_for(num_tokens) - len(prefix)
        revived = sum(self._refs[block] == 0 for block in prefix)
        if fresh > self.num_free - revived:
            return False
        for block in prefix:
            self._refs[block] += 1
            self._cached.pop(block, None)
        self.tables[request_id] = prefix + self._take(fresh)
        return True

    def grow(self, request_id: str, num_tokens: int) -> bool:
        """Extend a table to cover ``num_tokens``; False, and nothing changed, when too few blocks are free."""
        table = self.tables[request_id]
        fresh = -(-num_tokens // self.block_size) - len(table)
        if fresh <= 0:
            return True
        if fresh > len(self._blank) + len(self._cached):
            return False
        if fresh == 1 and self._blank:
            block = self._blank.pop()
            self._refs[block] = 1
            self.tables[request_id] = [*table, block]
            return True
        self.tables[request_id] = table + self._take(fresh)
        return True

    def publish(self, request_id: str, index: int, key: bytes) -> None:
        """Name the full block at ``index`` of a table. The first of two equal blocks keeps the name."""
        block = self.tables[request_id][index]
        if self._hash_of[block] is None and key not in self._block_of:
            self._hash_of[block] = key
            self._block_of[key] = block
            self._had_names = True

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """Take back names: what the blocks hold cannot be trusted, whoever holds them now."""
        for key in keys:
            block = self._block_of.get(key)
            if block is not None:
                self._forget_hash(block)

    def free(self, request_id: str) -> None:
        """Return a sequence's blocks, wherever they are. The end of a sequence is reused before its start."""
        self._release(self.tables.pop(request_id, ()))
        self._free_host.extend(self._host_tables.pop(request_id, ()))

    def swap_out(self, request_id: str) -> list[tuple[int, int]] | None:
        """Move a sequence to host blocks: (device, host) copies to make, or None when the host is full."""
        table = self.tables[request_id]
        if len(table) > len(self._free_host):
            return None
        host = [self._free_host.pop() for _ in table]
        del self.tables[request_id]
        self._release(table)
        self._host_tables[request_id] = host
        return list(zip(table, host, strict=True))

    def swap_in(self, request_id: str, num_tokens: int) -> list[tuple[int, int]] | None:
        """Move a sequence back, with room for ``num_tokens``: (host, device) copies, or None when full."""
        host = self._host_tables[request_id]
        fresh = max(self.blocks_for(num_tokens), len(host))
        if fresh > self.num_free:
            return None
        table = self._take(fresh)
        del self._host_tables[request_id]
        self._free_host.extend(host)
        self.tables[request_id] = table
        return list(zip(host, table, strict=False))

    def check(self) -> None:
        """Raise AssertionError unless every block is owned exactly as often as it is counted."""
        held = Counter(block for table in self.tables.values() for block in table)
        assert all(self._refs[block] == held[block] for block in range(self.num_blocks)), "reference counts"
        assert not set(self._blank) & self._cached.keys(), "free list"
        assert {*self._blank, *self._cached} == {block for block in range(self.num_blocks) if held[block] == 0}, (
            "free list"
        )
        assert self.num_free + len(held) == self.num_blocks, "free + used == total"
        host = [block for table in self._host_tables.values() for block in table]
        assert sorted(host + self._free_host) == list(range(self.num_host_blocks)), "host blocks"
        assert all(self._hash_of[block] == key for key, block in self._block_of.items()), "names"
        assert sum(key is not None for key in self._hash_of) == len(self._block_of), "names"
        assert not self.tables.keys() & self._host_tables.keys(), "a sequence in two places"

    def _take(self, count: int) -> list[int]:
        """So many free blocks, which there must be."""
        if count <= 0:
            return []
        blank, refs = self._blank, self._refs
        taken = blank[: -count - 1 : -1]
        del blank[-count:]
        while len(taken) < count:
            block, _ = self._cached.popitem(last=False)
            self._forget_hash(block)
            taken.append(block)
        for block in taken:
            refs[block] = 1
        return taken

    def _release(self, table: Sequence[int]) -> None:
        """The blocks of a sequence, from its end on."""
        refs, names, blank = self._refs, self._hash_of, self._blank
        if not self._had_names:
            # None is shared.
            for block in table:
                refs[block] = 0
            blank += table[::-1]
            return
        for block in reversed(table):
            refs[block] -= 1
            if refs[block]:
                continue
            if names[block] is None:
                blank.append(block)
            else:
                self._cached[block] = None

    def _forget_hash(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._block_of[key]
            self._hash_of[block] = None
