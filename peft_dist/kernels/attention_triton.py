"""Paged attention in Triton: always there on a GPU, and for every head size, window, soft cap and sink."""

from __future__ import annotations

import math

import torch

from peft_dist.kernels import attention_triton_chunks as chunks
from peft_dist.kernels import attention_triton_decode as decode
from peft_dist.kernels import kv_write_triton
from peft_dist.kernels.attention_interface import AttentionNeeds
from peft_dist.kernels.attention_triton_schedule import extra_parts
from peft_dist.kernels.triton_device import device_of, interpreted
from peft_dist.kernels.types import AttentionMetadata, KVCache

_LOG2_E = math.log2(math.e)
_MAX_HEAD = 256


class TritonAttention:
    """Chunks and decodes by two kernels that read device tensors alone.

    Args:
        chunk_tile, decode_tile: Sizes for every call; None goes by type and head size.
        num_splits: Parts that the keys of all decodes are cut into beyond one each, a power of two up to 64; None goes
            by the GPU.
    """

    name = "triton"
    description = "triton"
    graph_capturable = True

    def __init__(
        self,
        chunk_tile: chunks.ChunkTile | None = None,
        decode_tile: decode.DecodeTile | None = None,
        num_splits: int | None = None,
    ) -> None:
        self._chunk_tile, self._decode_tile, self._num_splits = chunk_tile, decode_tile, num_splits

    def supports(self, needs: AttentionNeeds) -> str | None:
        """Why a layer cannot run here, or None."""
        if needs.device.type != "cuda" and not (needs.device.type == "cpu" and interpreted()):
            return f"it runs on CUDA devices, not on {needs.device.type}"
        if needs.dtype not in (torch.float16, torch.bfloat16, torch.float32) or needs.cache_dtype != needs.dtype:
            return f"{needs.dtype} activations with a {needs.cache_dtype} cache"
        if max(needs.head_dim, needs.value_dim) > _MAX_HEAD:
            return f"head size {needs.head_dim} (values {needs.value_dim}): it takes up to {_MAX_HEAD}"
        return None

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
        """As ``attention.write_kv``."""
        kv_write_triton.write_kv(key, value, cache, meta)

    def paged_attention(
        self,
        query: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As ``attention.paged_attention``."""
        num_tokens, num_heads, head_dim = query.shape
        num_kv_heads = cache.key.shape[2]
        if num_tokens != len(meta.slot_mapping_t) or head_dim != cache.key.shape[3] or num_heads % num_kv_heads:
            raise ValueError(
                f"query {list(query.shape)} does not fit {len(meta.slot_mapping_t)} tokens of {list(cache.key.shape)}"
            )
        query = query if query.stride(2) == 1 else query.contiguous()
        sinks = None if sinks is None else sinks.detach().contiguous()
        out = query.new_empty(num_tokens, num_heads, cache.value.shape[3])
        factors = (scale * _LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2_E)
        only_decodes = meta.max_query_len == 1
        with device_of(query):
            if not only_decodes:
                tile = self._chunk_tile or chunks.tile_for(query.dtype, head_dim)
                has_decodes = _may_have_decodes(meta, num_tokens)
                chunks.attend_chunks(out, query, cache, meta, factors, sliding_window, sinks, tile, has_decodes)
            if only_decodes or has_decodes:
                tile = self._decode_tile or decode.tile_for(query.dtype, head_dim)
                splits = self._num_splits or extra_parts(meta.num_seqs, num_kv_heads, _processors(query))
                decode.attend_decodes(out, query, cache, meta, factors, sliding_window, sinks, tile, splits)
        return out


def _processors(query: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 8


def _may_have_decodes(meta: AttentionMetadata, num_tokens: int) -> bool:
    """False where the sizes alone tell that no sequence has one query token; true costs an empty launch."""
    return num_tokens <= (meta.num_seqs - 1) * meta.max_query_len + 1
