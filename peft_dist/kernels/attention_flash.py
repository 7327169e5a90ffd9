"""FlashAttention with block tables: prefill, chunks and decodes of a batch in one call."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from peft_dist.kernels.attention_interface import AttentionBackend, AttentionNeeds
from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.flash_libraries import FlashLibrary, find_library
from peft_dist.kernels.types import AttentionMetadata, KVCache

# What we pass, and the names that builds have for it; the first known name is taken. The keys' lengths go by the first
# that the function has: lengths, or their running sums in releases that know only those.
_NAMES = {
    "query": ("q",),
    "key": ("k_cache", "k"),
    "value": ("v_cache", "v"),
    "query_starts": ("cu_seqlens_q",),
    "max_query": ("max_seqlen_q",),
    "max_key": ("max_seqlen_k",),
    "blocks": ("block_table", "page_table"),
    "scale": ("softmax_scale",),
    "causal": ("causal",),
    "window": ("window_size",),
    "softcap": ("softcap",),
    "sinks": ("s_aux", "sinks", "learnable_sink"),
    "version": ("fa_version",),
    "num_splits": ("num_splits",),
    "metadata": ("scheduler_metadata",),
}
_LENGTHS = ("seqused_k", "cache_seqlens")
_LENGTH_SUMS = "cu_seqlens_k"
# From here on its own tiles can be whole KV blocks, which the copy engine brings without a mask: what another sequence
# left in them, NaN even, would be multiplied by zero.
_WHOLE_BLOCK = 64
_LONG_CONTEXT = 8192
"""Up to this context, a batch that fills the GPU with its sequences alone is not split over keys."""


class FlashAttention:
    """A FlashAttention build behind the interface. Splits over keys are decided on the device, by the real lengths.

    Args:
        library: What was found (``flash_libraries.find_library``).
        share_metadata: Compute the schedule once a forward, where the build can, and not in every layer.
        decodes: Runs batches of decodes alone, where the build is FlashAttention 3: its tiles of 64 or 128 query rows
            take a multiprocessor each, and short contexts wait more than they read
            (``docs/results/attention_h100.json``).
    """

    name = "vllm-flash-attn"
    graph_capturable = True

    def __init__(
        self, library: FlashLibrary, share_metadata: bool = True, decodes: AttentionBackend | None = None
    ) -> None:
        self._decodes = decodes if library.version == 3 else None
        self.description = f"{self.name} (FlashAttention {library.version} of {library.source})"
        if self._decodes is not None:
            self.description += f", decodes by {self._decodes.description}"
        self._library = library
        self._parameters = inspect.signature(library.function).parameters
        self._names = {
            role: next((name for name in names if name in self._parameters), None) for role, names in _NAMES.items()
        }
        self._length = next((name for name in _LENGTHS if name in self._parameters), None)
        self._share_metadata = share_metadata and library.scheduler_metadata is not None

    @classmethod
    def load(cls, capability: tuple[int, int] | None) -> FlashAttention:
        """The best build for this compute capability.

        Raises:
            BackendUnavailableError: there is none.
        """
        library = find_library(capability)
        if not has_triton():
            return cls(library)
        from peft_dist.kernels.attention_triton import TritonAttention

        return cls(library, decodes=TritonAttention())

    def supports(self, needs: AttentionNeeds) -> str | None:
        """Why a layer cannot run here, or None."""
        library = self._library
        if needs.device.type != "cuda":
            return f"it runs on CUDA devices, not on {needs.device.type}"
        if needs.dtype not in (torch.float16, torch.bfloat16) or needs.cache_dtype != needs.dtype:
            return f"{needs.dtype} activations with a {needs.cache_dtype} cache: it takes float16 or bfloat16 for both"
        if needs.value_dim != needs.head_dim or needs.head_dim % 8 or needs.head_dim > 256:
            return f"head size {needs.head_dim} (values {needs.value_dim}): it takes multiples of 8 up to 256"
        if needs.block_size % library.block_multiple:
            return f"KV blocks of {needs.block_size} tokens: this build takes multiples of {library.block_multiple}"
        if library.version == 3 and needs.block_size >= _WHOLE_BLOCK:
            return f"KV blocks of {needs.block_size} tokens are read whole, with what lies behind a sequence in them"
        if needs.softcap and self._names["softcap"] is None:
            return "a soft cap, which this build does not know"
        if needs.sinks is not None:
            if library.version != 3 or self._names["sinks"] is None:
                return "attention sinks, which this build does not know"
            if needs.sinks != torch.bfloat16 or needs.num_heads > 64:
                return f"{needs.sinks} sinks of {needs.num_heads} heads: it takes bfloat16 ones of up to 64"
        return None

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
        """As ``attention.write_kv``."""
        from peft_dist.kernels import kv_write_triton

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
        """As ``attention.paged_attention``. Rows of sequences without context come out as anything."""
        if meta.max_query_len == 1 and self._decodes is not None:
            return self._decodes.paged_attention(
                query, cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
            )
        # A query sees so many keys to its left and none to its right, itself not counted.
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        num_splits = self._num_splits(query, cache, meta)
        given: dict[str, Any] = {
            "query": query if query.stride(2) == 1 else query.contiguous(),
            "key": cache.key,
            "value": cache.value,
            "query_starts": meta.query_start_loc_t,
            "max_query": meta.max_query_len,
            "max_key": meta.max_context_len,
            "blocks": meta.block_tables_t,
            "scale": scale,
            "causal": True,
            "window": window,
            "num_splits": num_splits,
            "version": self._library.version,
        }
        if softcap is not None:
            given["softcap"] = softcap
        if sinks is not None:
            given["sinks"] = sinks.detach().contiguous()
        if self._share_metadata:
            given["metadata"] = self._metadata(query, cache, meta, window, softcap is not None, num_splits)
        arguments = {name: given[role] for role, name in self._names.items() if name is not None and role in given}
        if self._length is not None:
            arguments[self._length] = meta.context_lens_t
        else:
            arguments[_LENGTH_SUMS] = _running_sums(meta)
        result = self._library.function(**arguments)
        return result[0] if isinstance(result, tuple) else result

    def _num_splits(self, query: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> int:
        """1 where the sequences alone give every multiprocessor work; else 0, the build's own bound.

        With a bound above 1 each layer has a second launch that combines the parts.
        """
        if self._library.version != 3:
            return 0
        num_kv_heads = cache.key.shape[2]
        rows = len(query) * query.shape[1] // num_kv_heads
        tiles = max(meta.num_seqs, rows // 128) * num_kv_heads
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
        return int(2 * tiles >= 3 * processors and meta.max_context_len <= _LONG_CONTEXT)

    def _metadata(
        self,
        query: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        window: tuple[int, int],
        softcap: bool,
        num_splits: int,
    ) -> torch.Tensor:
        """The schedule of layers of this shape, once a forward. Its arguments must be those of the call."""
        _, block_size, num_kv_heads, head_dim = cache.key.shape
        key = ("flash", query.shape[1], num_kv_heads, head_dim, query.dtype, window, softcap)
        if key not in meta.scratch:
            assert self._library.scheduler_metadata is not None
            meta.scratch[key] = self._library.scheduler_metadata(
                batch_size=meta.num_seqs,
                max_seqlen_q=meta.max_query_len,
                max_seqlen_k=meta.max_context_len,
                num_heads_q=query.shape[1],
                num_heads_kv=num_kv_heads,
                headdim=head_dim,
                cache_seqlens=meta.context_lens_t,
                qkv_dtype=query.dtype,
                cu_seqlens_q=meta.query_start_loc_t,
                page_size=block_size,
                causal=True,
                window_size=window,
                has_softcap=softcap,
                num_splits=num_splits,
            )
        return meta.scratch[key]  # type: ignore[return-value]


def _running_sums(meta: AttentionMetadata) -> torch.Tensor:
    """int32 ``[S + 1]``: where each sequence's keys would start if they lay one after another."""
    if "flash_sums" not in meta.scratch:
        meta.scratch["flash_sums"] = F.pad(meta.context_lens_t.cumsum(0, dtype=torch.int32), (1, 0))
    return meta.scratch["flash_sums"]  # type: ignore[return-value]
