"""What an attention back end is, and what it is asked for."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from peft_dist.kernels.types import AttentionMetadata, KVCache


class BackendUnavailableError(RuntimeError):
    """A back end was asked for by name that cannot run here; the text says why, and the remedy."""


class AttentionNeeds(NamedTuple):
    """What one layer needs of its back end.

    ``dtype`` is that of queries, keys and values as they come, ``cache_dtype`` that of the cache. ``window`` and
    ``softcap``: whether the layer has one. ``sinks`` is the type of its sinks, if it has any. ``contiguous``: both
    caches are.
    """

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    block_size: int
    window: bool = False
    softcap: bool = False
    sinks: torch.dtype | None = None
    contiguous: bool = True


class AttentionBackend(Protocol):
    """One implementation of paged attention.

    Attributes:
        name: What ``AttentionMetadata.backend`` calls it.
        description: The same with its origin, for the log.
        graph_capturable: It reads only device tensors and integers that are the same in every replay.
    """

    name: str
    description: str
    graph_capturable: bool

    def supports(self, needs: AttentionNeeds) -> str | None:
        """None when it runs such a layer, else what it lacks, in a few words."""
        ...

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
        """As ``attention.write_kv``."""
        ...

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
        ...
