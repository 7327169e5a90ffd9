"""One layer of the LoRA pool: its pages, and the tables that kernels read them through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from peft_dist.kernels.lora_tables import TABLE_HEAD, use_table
from peft_dist.kernels.page_allocator import PageAllocator
from peft_dist.kernels.slot_tables import SlotTables
from peft_dist.kernels.types import LoRALayerWeights


class PooledLayer:
    """``weights`` outlives its adapters, so that kernels keep what they derived.

    Attributes:
        moves: How often the buffers or the tables on the device have changed their addresses.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device,
        dtype: torch.dtype,
        page_rows: int,
        *,
        grows_tables: bool = False,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.pages = PageAllocator()
        self.moves = 0
        self._grows_tables = grows_tables
        self._table: torch.Tensor | None = None
        self.weights = LoRALayerWeights(
            A=torch.empty(0, in_features, dtype=dtype, device=device),
            B=torch.empty(0, out_features, dtype=dtype, device=device),
            page_rows=page_rows,
            pages=np.zeros((0, 0), np.int32),
            rank=np.zeros(0, np.int32),
            scaling=np.zeros(0, np.float32),
            finite=np.zeros(0, bool),
        )

    @property
    def num_resident(self) -> int:
        return int(np.count_nonzero(self.weights.rank))

    def take(self, rank: int) -> list[int]:
        """Pages for ``rank`` rows; the buffers grow when there are too few."""
        count = -(-rank // self.weights.page_rows)
        pages = self.pages.allocate(count)
        if pages is None:
            self.grow(max(2 * self.pages.capacity, self.pages.capacity + count))
            pages = self.pages.allocate(count)
            assert pages is not None, "the buffers grew by at least the rank"
        return pages

    def grow(self, num_pages: int) -> None:
        """Make room for ``num_pages``; the new ones hold anything, and cost nothing on a CPU until they are written."""
        held = self.weights
        held.A, held.B = (_with_rows(tensor, num_pages * held.page_rows) for tensor in (held.A, held.B))
        self.pages.grow(num_pages)
        self.moves += 1

    def share_tables(self, tables: SlotTables) -> None:
        """Have the tables among those of other layers, where ``tables`` keeps them: ``show`` and ``hide`` are its."""
        tables.add_layer(self.weights)
        self.moves += 1

    def _use_table(self, table: torch.Tensor) -> None:
        self._table = table
        self.moves += 1
        use_table(self.weights, table)

    def segments(self, pages: Sequence[int], rank: int) -> Iterator[tuple[int, int, int]]:
        """(first row, rows, rows before it) of each run of these pages that lie side by side, for so many rows."""
        return _segments(pages, self.weights.page_rows, rank)

    def read(self, slot: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A ``[r, in]``, B ``[out, r]`` (a transposed view) and the scaling of a slot, copied out of its pages."""
        held = self.weights
        rank = int(held.rank[slot])
        pages = held.pages[slot, : -(-rank // held.page_rows)].tolist()
        segments = list(_segments(pages, held.page_rows, rank))
        A, B = (torch.cat([t[first : first + count] for first, count, _ in segments]) for t in (held.A, held.B))
        return A, B.T, float(held.scaling[slot])

    def show(self, slot: int, rank: int, pages: Sequence[int], scaling: float, finite: bool) -> None:
        """Enter a slot into the tables."""
        held = self.weights
        self._fit_tables(slot, len(pages))
        entry = (rank, np.float32(scaling), list(pages))
        is_new = self._grows_tables and entry != (
            held.rank[slot], held.scaling[slot], held.pages[slot, : len(pages)].tolist()
        )  # fmt: skip
        held.rank[slot], held.scaling[slot], held.pages[slot, : len(pages)] = entry
        held.finite[slot] = finite
        held.version += 1
        wanted = (len(held.rank), TABLE_HEAD + held.pages.shape[1])
        if not self._grows_tables:
            return
        if self._table is None or self._table.shape != wanted:
            self._use_table(self._table_of_all())
        elif is_new:
            row = torch.tensor([rank, int(np.float32(scaling).view(np.int32)), *pages], dtype=torch.int32)
            self._table[slot, : len(row)].copy_(row.pin_memory() if self._table.is_cuda else row, non_blocking=True)

    def _table_of_all(self) -> torch.Tensor:
        held = self.weights
        head = np.stack([held.rank.astype(np.int32), held.scaling.astype(np.float32).view(np.int32)], axis=1)
        return torch.from_numpy(np.concatenate([head, held.pages], axis=1)).to(held.A.device)

    def hide(self, slot: int) -> None:
        """Take a slot out of the tables."""
        held = self.weights
        held.pages[slot] = 0
        held.rank[slot] = 0
        held.scaling[slot] = 0.0
        held.finite[slot] = False
        held.version += 1
        if self._table is not None:
            self._table[slot, :TABLE_HEAD].zero_()

    def find_inconsistency(self, resident: Mapping[int, tuple[int, Sequence[int]]]) -> str | None:
        """What the tables say other than ``resident`` (rank and pages by slot); else None."""
        held = self.weights
        ranks = {int(slot): int(held.rank[slot]) for slot in np.flatnonzero(held.rank)}
        if ranks != {slot: rank for slot, (rank, _) in resident.items()}:
            return f"slots {sorted(resident)} are registered, ranks say {ranks}"
        for slot, (_, pages) in resident.items():
            if held.pages[slot, : len(pages)].tolist() != list(pages):
                return f"slot {slot} owns pages {list(pages)}, its table says {held.pages[slot].tolist()}"
        rows = self.pages.capacity * held.page_rows
        if rows != held.A.shape[0] or rows != held.B.shape[0]:
            return f"{rows} rows are managed, A and B have {held.A.shape[0]}, {held.B.shape[0]}"
        return None

    def _fit_tables(self, slot: int, num_pages: int) -> None:
        held = self.weights
        slots, columns = held.pages.shape
        more_slots = max(slot + 1 - slots, 0)
        more_columns = max(num_pages - columns, 0)
        if more_slots or more_columns:
            # Doubled, so that one slot after another does not copy the tables each time.
            more_slots = max(more_slots, slots) if more_slots else 0
            held.pages = np.pad(held.pages, ((0, more_slots), (0, more_columns)))
            held.rank, held.scaling, held.finite = (
                np.pad(array, (0, more_slots)) for array in (held.rank, held.scaling, held.finite)
            )


def _segments(pages: Sequence[int], page_rows: int, rank: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, rows before it) of each run of pages side by side."""
    done = 0
    for _, run in itertools.groupby(enumerate(pages), key=lambda item: item[1] - item[0]):
        run_pages = [page for _, page in run]
        count = min(len(run_pages) * page_rows, rank - done)
        yield run_pages[0] * page_rows, count, done
        done += count


def _with_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A copy with more rows; the new ones hold anything until an adapter is stored there."""
    grown = tensor.new_empty(num_rows, tensor.shape[1])
    grown[: len(tensor)].copy_(tensor)
    return grown
