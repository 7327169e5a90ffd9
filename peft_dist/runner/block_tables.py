"""Block tables of running sequences as one array, of which a step rewrites only what has changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_dist.core.batch import ScheduledSequence


class BlockTables:
    """A row for each sequence that decodes; rows are written anew when a table has changed, which is once a block."""

    def __init__(self, max_blocks: int) -> None:
        self._rows = np.zeros((16, max_blocks), dtype=np.int32)
        self._row_of: dict[str, int] = {}
        self._held: dict[str, list[int]] = {}
        self._free = list(range(16))

    def gather(self, sequences: Sequence[ScheduledSequence], out: np.ndarray) -> None:
        """Write int32 ``[len(sequences), max_blocks]``, padded with 0, to ``out``."""
        rows = [self._row(sequence) for sequence in sequences]
        # Without a mode that cannot fail, numpy writes to a buffer first.
        np.take(self._rows, rows, axis=0, out=out, mode="clip")

    def forget(self, request_id: str) -> None:
        """Give the row of a sequence that has ended to the next."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free.append(row)
            del self._held[request_id]

    def _row(self, sequence: ScheduledSequence) -> int:
        request_id, table = sequence.request_id, sequence.block_table
        row = self._row_of.get(request_id)
        if row is None:
            row = self._row_of[request_id] = self._take()
        elif self._held[request_id] == table:
            return row
        self._held[request_id] = table
        self._rows[row, : len(table)] = table
        self._rows[row, len(table) :] = 0
        return row

    def _take(self) -> int:
        if not self._free:
            count = len(self._rows)
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._free = list(range(count, 2 * count))
        return self._free.pop()
