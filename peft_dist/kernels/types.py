"""Batch views that the kernels take: plain tensors and integers, no policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from peft_dist.kernels.lora_tiles import LoRATiles
from peft_dist.kernels.lora_workspace import LoRAWorkspace


class KVCache(NamedTuple):
    """Paged keys and values of one layer, each ``[num_blocks, block_size, num_kv_heads, head_dim]``."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where the ``T`` packed query tokens of ``S`` sequences stand and where their KV lies.

    Host arrays are what CPU kernels and planning read; ``*_t`` are the same on the model's device.

    Attributes:
        query_start_loc: int32 ``[S + 1]``; sequence s has the query rows ``query_start_loc[s]:[s + 1]``.
        context_lens: int32 ``[S]``; KV tokens of each sequence, this step's included. Query j of n stands at
            position ``context_len - n + j`` and sees keys up to its own position.
        block_tables: int32 ``[S, max_blocks]``; rows are padded with 0.
        slot_mapping: int64 ``[T]``, ``block * block_size + offset`` of each query token's KV.
    """

    query_start_loc: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    slot_mapping: np.ndarray
    query_start_loc_t: torch.Tensor
    context_lens_t: torch.Tensor
    block_tables_t: torch.Tensor
    slot_mapping_t: torch.Tensor
    max_query_len: int
    max_context_len: int
    scratch: dict[object, object] = field(default_factory=dict)
    """What a back end derives once and reuses in every layer of the same forward."""
    backend: str | None = None
    """One of ``attention_backends.NAMES``; None takes the best that the tensors' device has."""

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self.context_lens)


@dataclass(slots=True)
class LoRALayerWeights:
    """All resident adapters of one layer, in pages of rank rows; a slot is a list of pages.

    Rows of a slot's last page beyond its rank hold anything and are never read.

    Attributes:
        A: ``[rows, in_features]``; page p is the rows ``p * page_rows : (p + 1) * page_rows``.
            For an embedding, ``[rows, num_embeddings]``.
        B: ``[rows, out_features]``, the transpose of PEFT's ``lora_B``, in the same pages.
        page_rows: Rows of one page.
        pages: int32 ``[slots, max_pages]``; slot s has its ranks in ``pages[s, 0]``, ``pages[s, 1]`` and so on.
        rank: int32 ``[slots]``; 0 where a slot does not adapt this layer.
        scaling: float32 ``[slots]``, applied to the rank intermediate (alpha / r or alpha / sqrt(r)).
        finite: bool ``[slots]``; B is known to hold no NaN and no infinity.
        pages_t, rank_t, scaling_t: The first three tables on the device of A, at addresses that stay; None on a CPU
            and in a pool that grows.
        workspace: The pool's memory for rank intermediates on a device; None where there is no pool.
        version: Counts changes; back ends may cache what they derive from one version.
    """

    A: torch.Tensor
    B: torch.Tensor
    page_rows: int
    pages: np.ndarray
    rank: np.ndarray
    scaling: np.ndarray
    finite: np.ndarray
    pages_t: torch.Tensor | None = None
    rank_t: torch.Tensor | None = None
    scaling_t: torch.Tensor | None = None
    workspace: LoRAWorkspace | None = None
    version: int = 0
    scratch: dict[object, object] = field(default_factory=dict)

    def rows_of(self, slots: int | np.ndarray) -> np.ndarray:
        """Rows of A and B that these slots (int or int ``[n]``) own, in order of slots and ranks. int64."""
        return rows_of_slots(self.pages, self.rank, self.page_rows, np.atleast_1d(slots))


def rows_of_slots(pages: np.ndarray, rank: np.ndarray, page_rows: int, slots: np.ndarray) -> np.ndarray:
    """``LoRALayerWeights.rows_of`` for these tables."""
    ranks = rank[slots]
    columns = np.arange(-(-int(ranks.max(initial=0)) // page_rows) * page_rows)
    rows = pages[slots[:, None], columns // page_rows].astype(np.int64) * page_rows
    return (rows + columns % page_rows)[columns < ranks[:, None]]


@dataclass(slots=True)
class LoRAPlan:
    """Which rows of a layer's input belong to which adapter slot.

    Rows ``starts[i] : starts[i + 1]`` belong to ``slots[i]`` (-1: the base). Runs of one slot are adjacent
    when the caller sorts its rows by slot, which makes each adapter's weights be read once.

    Attributes:
        slots: int32 ``[runs]``.
        starts: int32 ``[runs + 1]``, from 0 to the number of rows.
        backend: "c", "triton" or "torch"; None takes the best that the tensors' device has.
        factor: Multiplies every adapter's part: -1 takes a part away that merged weights put in for all rows.
        tiles: The same rows in tiles on the device, for the Triton kernels, which read nothing else of the plan then
            but ``num_rows`` and ``factor``; None: they make them from the runs.
        layers: All layers that are run by this plan in one pass, which uses a plan of its own: the Triton kernels look
            their tables up for all tiles at once then (``lora_lookup_triton``). Empty: each launch does it.
        fuses: A layer's own product may be in one launch with what is added (``few_rows``). All adapters must be
            finite: there each row is multiplied with every adapter's B, if only by zeros.
    """

    slots: np.ndarray
    starts: np.ndarray
    scratch: dict[object, object] = field(default_factory=dict)
    backend: str | None = None
    factor: float = 1.0
    tiles: LoRATiles | None = None
    layers: Sequence[LoRALayerWeights] = ()
    fuses: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the layers' inputs, with and without an adapter."""
        return int(self.starts[-1])

    @classmethod
    def from_rows(cls, row_slots: np.ndarray, backend: str | None = None) -> LoRAPlan | None:
        """Plan of rows with these slots (int ``[rows]``, -1 for the base); None when no row has an adapter."""
        row_slots = np.asarray(row_slots, dtype=np.int32)
        if not (row_slots >= 0).any():
            return None
        change = np.flatnonzero(row_slots[1:] != row_slots[:-1]) + 1
        starts = np.concatenate(([0], change, [len(row_slots)])).astype(np.int32)
        return cls(slots=row_slots[starts[:-1]].copy(), starts=starts, backend=backend)
