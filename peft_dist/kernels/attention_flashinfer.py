"""FlashInfer behind the interface. It plans each forward on the host, so that no graph can hold it."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from types import ModuleType
from typing import Any

import numpy as np
import torch

from peft_dist.kernels.attention_interface import AttentionNeeds, BackendUnavailableError
from peft_dist.kernels.types import AttentionMetadata, KVCache

_WORKSPACE_BYTES = 128 << 20
_HEADS = (64, 128, 256)


class FlashInferAttention:
    """Prefill and decodes through FlashInfer's paged prefill wrapper, planned from the metadata's host arrays."""

    name = "flashinfer"
    graph_capturable = False

    def __init__(self, module: ModuleType) -> None:
        self.description = f"{self.name} {getattr(module, '__version__', 'of unknown version')}"
        self._module = module
        # A wrapper holds the plan of one forward: threads that run models of their own must not share it.
        self._own = threading.local()

    @classmethod
    def load(cls, capability: tuple[int, int] | None) -> FlashInferAttention:
        """
        Raises:
            BackendUnavailableError: it is not installed, or the device is too old for it.
        """
        if capability is None or capability < (8, 0):
            raise BackendUnavailableError(f"FlashInfer needs compute capability 8.0, this device has {capability}")
        if importlib.util.find_spec("flashinfer") is None:
            raise BackendUnavailableError("flashinfer is not installed")
        try:
            return cls(importlib.import_module("flashinfer"))
        except (ImportError, OSError) as error:
            raise BackendUnavailableError(f"flashinfer does not load: {error}") from error

    def supports(self, needs: AttentionNeeds) -> str | None:
        """Why a layer cannot run here, or None."""
        if needs.device.type != "cuda":
            return f"it runs on CUDA devices, not on {needs.device.type}"
        if needs.dtype not in (torch.float16, torch.bfloat16) or needs.cache_dtype != needs.dtype:
            return f"{needs.dtype} activations with a {needs.cache_dtype} cache: it takes float16 or bfloat16 for both"
        if needs.head_dim not in _HEADS or needs.value_dim != needs.head_dim:
            return f"head size {needs.head_dim} (values {needs.value_dim}): it takes {', '.join(map(str, _HEADS))}"
        if needs.sinks is not None:
            return "attention sinks"
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
        """As ``attention.paged_attention``; layers of one shape share a plan."""
        _, block_size, num_kv_heads, head_dim = cache.key.shape
        key = (query.device, query.dtype, query.shape[1], num_kv_heads, head_dim, scale, sliding_window, softcap)
        wrapper = self._wrapper(key)
        if ("flashinfer", key) not in meta.scratch:
            lengths = meta.context_lens.astype(np.int32)
            pages = -(-lengths // block_size)
            used = np.arange(meta.block_tables.shape[1]) < pages[:, None]
            indices = torch.from_numpy(np.ascontiguousarray(meta.block_tables[used], np.int32))
            wrapper.plan(
                torch.from_numpy(np.ascontiguousarray(meta.query_start_loc, np.int32)),
                torch.from_numpy(np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)),
                indices.to(query.device),
                torch.from_numpy(lengths - (pages - 1) * block_size),
                query.shape[1],
                num_kv_heads,
                head_dim,
                block_size,
                causal=True,
                sm_scale=scale,
                window_left=-1 if sliding_window is None else sliding_window - 1,
                logits_soft_cap=softcap or 0.0,
                q_data_type=query.dtype,
                kv_data_type=cache.key.dtype,
            )
            meta.scratch["flashinfer", key] = True
        out: torch.Tensor = wrapper.run(query.contiguous(), (cache.key, cache.value))
        return out

    def _wrapper(self, key: tuple[Any, ...]) -> Any:
        """This thread's wrapper for layers of one shape; all of a device share a workspace."""
        wrappers, workspaces = self._own.__dict__.setdefault("state", ({}, {}))
        if key not in wrappers:
            device = key[0]
            if device not in workspaces:
                workspaces[device] = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            wrappers[key] = self._module.BatchPrefillWithPagedKVCacheWrapper(workspaces[device], "NHD")
        return wrappers[key]
