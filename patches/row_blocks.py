"""Block tables of a padded batch: which KV block holds which token of which row. Host side, no tensors."""

from __future__ import annotations

import numpy as np


class RowBlocks:
    """Blocks of each batch row; rows that began alike (beams) share blocks until one writes to them.

    Attributes:
        lens: int64 ``[rows]``, tokens stored of each row (padding is not stored).
        tables: int32 ``[rows, width]``, block ids, 0 behind a row's last block.
        num_blocks: Blocks that exist; grows when rows need more.
    """

    def __init__(self, rows: int, block_size: int, num_blocks: int = 0) -> None:
        self.block_size = block_size
        self.lens = np.zeros(rows, np.int64)
        self.counts = np.zeros(rows, np.int64)
        self.tables = np.zeros((rows, 0), np.int32)
        self.num_blocks = num_blocks
        self._refs = np.zeros(num_blocks, np.int64)
        self._free = list(range(num_blocks - 1, -1, -1))

    def append(self, new: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Make room for ``new[row]`` (int ``[rows]``) more tokens and count them as stored.

        Returns:
            int64 ``[new.sum()]``, the slot of each token in row order, and the block copies (source,
            destination) to do before anything is written.
        """
        self._reserve(new)
        copies = self._unshare(np.flatnonzero((new > 0) & (self.lens % self.block_size > 0)))
        needed = -(-(self.lens + new) // self.block_size)
        for row in np.flatnonzero(needed > self.counts):
            self._extend(int(row), int(needed[row]))
        rows = np.repeat(np.arange(len(new)), new)
        offsets = np.arange(len(rows)) - np.repeat(np.cumsum(new) - new, new)
        slots = self.slots(rows, self.lens[rows] + offsets)
        self.lens = self.lens + new
        return slots, copies

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 slots of stored tokens, given their rows and their numbers within the row."""
        blocks = self.tables[rows, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows, in this order, repeated as often as they are named."""
        self.lens, self.counts, self.tables = self.lens[rows], self.counts[rows], self.tables[rows]
        self._recount()

    def truncate(self, lens: np.ndarray) -> None:
        """Forget all but the first ``lens[row]`` tokens of each row."""
        self.lens = np.minimum(self.lens, lens)
        self.counts = -(-self.lens // self.block_size)
        self._recount()

    def _reserve(self, new: np.ndarray) -> None:
        """Grow (at least by half) so that every allocation below succeeds, copies on write included."""
        wanted = int((-(-(self.lens + new) // self.block_size) - self.counts).sum()) + len(new)
        missing = wanted - len(self._free)
        if missing > 0:
            grown = self.num_blocks + max(missing, self.num_blocks // 2)
            self._free.extend(range(grown - 1, self.num_blocks - 1, -1))
            self._refs = np.pad(self._refs, (0, grown - self.num_blocks))
            self.num_blocks = grown

    def _unshare(self, rows: np.ndarray) -> list[tuple[int, int]]:
        copies = []
        for row in rows:
            last = self.counts[row] - 1
            block = int(self.tables[row, last])
            if self._refs[block] > 1:
                fresh = self._take()
                self._refs[block] -= 1
                self.tables[row, last] = fresh
                copies.append((block, fresh))
        return copies

    def _extend(self, row: int, count: int) -> None:
        if count > self.tables.shape[1]:
            self.tables = np.pad(
                self.tables, ((0, 0), (0, max(count, 2 * self.tables.shape[1]) - self.tables.shape[1]))
            )
        for index in range(int(self.counts[row]), count):
            self.tables[row, index] = self._take()
        self.counts[row] = count

    def _take(self) -> int:
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def _recount(self) -> None:
        self.tables = np.where(np.arange(self.tables.shape[1]) < self.counts[:, None], self.tables, 0).astype(np.int32)
        used = self.tables[np.arange(self.tables.shape[1]) < self.counts[:, None]]
        self._refs = np.bincount(used, minlength=self.num_blocks).astype(np.int64)
        self._free = np.flatnonzero(self._refs == 0)[::-1].tolist()
