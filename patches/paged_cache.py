"""Hugging Face's dynamic cache with its keys and values in paged blocks, for one call of ``generate``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from peft_dist.kernels.types import AttentionMetadata
from peft_dist.patches.attention import UnsupportedAttentionError
from peft_dist.patches.kv_memory import BLOCK_SIZE, KVMemory
from peft_dist.patches.row_blocks import RowBlocks


class PassLayout(NamedTuple):
    """Where the tokens of one forward pass stand, on the host.

    Attributes:
        new: bool ``[B, S]``, which inputs are tokens.
        counts: int64 ``[B]``, tokens of each row.
        slots: int64 ``[T]``, as ``AttentionMetadata.slot_mapping``.
        lens: int32 ``[B]``, tokens stored of each row, this pass's included.
        tables: int32 ``[B, width]``, the rows' blocks.
    """

    new: np.ndarray
    counts: np.ndarray
    slots: np.ndarray
    lens: np.ndarray
    tables: np.ndarray


class PagedRows:
    """Paged keys and values of a padded batch. Padding is neither stored nor attended.

    Args:
        memory: Where they lie, from the first block on; None takes new memory that grows.

    Attributes:
        caches: Paged tensors by layer.
        tokens: bool ``[B, L]``, which of the padded positions seen so far hold tokens.
    """

    def __init__(self, rows: int, device: torch.device, memory: KVMemory | None = None) -> None:
        self.device = device
        self.memory = memory or KVMemory()
        self.blocks = RowBlocks(rows, BLOCK_SIZE, self.memory.num_blocks)
        self.tokens = np.zeros((rows, 0), bool)
        self.caches = self.memory.caches

    def append(self, new: np.ndarray) -> PassLayout:
        """Make room for a forward pass over ``new`` (bool ``[B, S]``, True where there is a token)."""
        counts = new.sum(1)
        slots, copies = self.blocks.append(counts)
        if self.blocks.num_blocks > self.memory.num_blocks:
            self.memory.grow(self.blocks.num_blocks)
        if copies:
            self.memory.copy(copies)
        self.tokens = np.concatenate([self.tokens, new], axis=1)
        width = int(self.blocks.counts.max(initial=1))
        return PassLayout(new, counts, slots, self.blocks.lens.astype(np.int32), self.blocks.tables[:, :width])

    def metadata(self, layout: PassLayout) -> tuple[AttentionMetadata, torch.Tensor | None]:
        """The metadata of a pass, and the rows of the flattened batch that hold tokens (None: all do)."""
        active = np.flatnonzero(layout.counts)
        counts, lens = layout.counts[active], layout.lens[active]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        tables = np.ascontiguousarray(layout.tables[active])
        meta = AttentionMetadata(
            query_start_loc=starts,
            context_lens=lens,
            block_tables=tables,
            slot_mapping=layout.slots,
            query_start_loc_t=self._to_device(starts),
            context_lens_t=self._to_device(lens),
            block_tables_t=self._to_device(tables),
            slot_mapping_t=self._to_device(layout.slots),
            max_query_len=int(counts.max(initial=0)),
            max_context_len=int(lens.max(initial=0)),
        )
        return meta, None if layout.new.all() else self._to_device(np.flatnonzero(layout.new))

    def begin(self, new: np.ndarray) -> tuple[AttentionMetadata, torch.Tensor | None]:
        """``append`` and ``metadata``."""
        return self.metadata(self.append(new))

    def gather(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as Hugging Face keeps them, ``[B, heads, L, head_dim]``, zeros where there is padding."""
        rows, positions = np.nonzero(self.tokens)
        numbers = (np.cumsum(self.tokens, axis=1) - 1)[rows, positions]
        slots = self._to_device(self.blocks.slots(rows, numbers))
        target = self._to_device(rows * self.tokens.shape[1] + positions)
        padded = []
        for paged in self.caches[layer]:
            flat = paged.new_zeros(self.tokens.size, *paged.shape[2:])
            flat.index_copy_(0, target, paged.flatten(0, 1).index_select(0, slots))
            padded.append(flat.view(*self.tokens.shape, *paged.shape[2:]).transpose(1, 2))
        return padded[0], padded[1]

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows, int ``[B']``; a row that is named several times shares its blocks."""
        self.blocks.select(rows)
        self.tokens = self.tokens[rows]

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` padded positions of every row."""
        self.tokens = self.tokens[:, :length]
        self.blocks.truncate(self.tokens.sum(1))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class PagedCache(DynamicCache):
    """A ``DynamicCache`` whose class was swapped while it was empty.

    ``update`` hands the new keys and values through: paged attention stores them and reads all others
    straight from the blocks. Lengths are Hugging Face's, padding included.
    """

    paged: PagedRows
    _lengths: dict[int, int]

    @classmethod
    def adopt(cls, cache: DynamicCache, rows: int, device: torch.device, memory: KVMemory | None = None) -> PagedCache:
        """Turn an empty dynamic cache into a paged one, in place."""
        cache.__class__ = cls
        assert isinstance(cache, PagedCache)
        cache.paged, cache._lengths = PagedRows(rows, device, memory), {}
        return cache

    def release(self) -> None:
        """Become a plain dynamic cache again with the contents that Hugging Face's own would have."""
        paged = self.paged
        self.discard()
        for layer in sorted(paged.caches):
            self.update(*paged.gather(layer), layer)

    def discard(self) -> None:
        """Become the empty dynamic cache again that was adopted."""
        del self.paged, self._lengths
        self.__class__ = DynamicCache  # type: ignore[assignment]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand one layer's new keys and values ``[B, heads, S, head_dim]`` through."""
        if key_states.shape != value_states.shape:
            raise UnsupportedAttentionError(
                f"paged blocks hold keys and values of one shape, but layer {layer_idx} has keys "
                f"{list(key_states.shape)} and values {list(value_states.shape)}"
            )
        self.paged.memory.ensure_layer(layer_idx, key_states)
        self._lengths[layer_idx] = self._lengths.get(layer_idx, 0) + key_states.shape[-2]
        return key_states, value_states

    def advance(self, tokens: int) -> None:
        """Count positions that were stored in every layer without ``update``."""
        self._lengths = {layer: length + tokens for layer, length in self._lengths.items()}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Padded positions that a layer has seen."""
        return self._lengths.get(layer_idx, 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Continue from rows ``beam_idx``, int64 ``[B]``."""
        self.paged.select(beam_idx.cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that ``indices`` names, or marks where it is bool."""
        self.paged.select(np.arange(len(self.paged.tokens))[indices.cpu().numpy()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put each row ``repeats`` times, one behind the other."""
        self.paged.select(np.repeat(np.arange(len(self.paged.tokens)), repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        length = self.get_seq_length()
        kept = length + tokens_to_remove if tokens_to_remove <= 0 else min(length, tokens_to_remove)
        self.paged.truncate(kept)
        self._lengths = dict.fromkeys(self._lengths, kept)

    def reset(self) -> None:
        """Forget all tokens."""
        self.crop(-self.get_seq_length())

    def activate_past_recording(self) -> None:
        """Nothing to do: blocks keep the whole past."""

    @property
    def is_croppable(self) -> bool:
        """Blocks can always be given back."""
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether any layer has seen tokens."""
        return bool(self._lengths)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.paged.tokens)
