"""Batch views that the kernels take: plain tensors and integers, no policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


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
    """"c" or "torch"; None takes the best that the tensors' device has (``kernels.backend.choose``)."""

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)


@dataclass(slots=True)
class LoRALayerWeights:
    """All resident adapters of one layer, stacked by rank rows: no adapter is padded to another's rank.

    Attributes:
        A: ``[rows, in_features]``; adapter slot s owns rows ``row_start[s] : row_start[s] + rank[s]``.
            For an embedding, ``[rows, num_embeddings]``.
        B: ``[rows, out_features]``, the transpose of PEFT's ``lora_B``, same row ownership.
        row_start, rank: int32 ``[slots]``; rank 0 where a slot does not adapt this layer.
        scaling: float32 ``[slots]``, applied to the rank intermediate (alpha / r or alpha / sqrt(r)).
        version: Counts changes; back ends may cache what they derive from one version.
    """

    A: torch.Tensor
    B: torch.Tensor
    row_start: np.ndarray
    rank: np.ndarray
    scaling: np.ndarray
    version: int = 0
    scratch: dict[object, object] = field(default_factory=dict)


@dataclass(slots=True)
class LoRAPlan:
    """Which rows of a layer's input belong to which adapter slot.

    Rows ``starts[i] : starts[i + 1]`` belong to ``slots[i]`` (-1: the base). Runs of one slot are adjacent
    when the caller sorts its rows by slot, which makes each adapter's weights be read once.

    Attributes:
        slots: int32 ``[runs]``.
        starts: int32 ``[runs + 1]``, from 0 to the number of rows.
        backend: "c" or "torch"; None takes the best that the tensors' device has.
    """

    slots: np.ndarray
    starts: np.ndarray
    scratch: dict[object, object] = field(default_factory=dict)
    backend: str | None = None

    @property
    def num_rows(self) -> int:
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
