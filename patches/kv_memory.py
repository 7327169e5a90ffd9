"""Paged keys and values of every layer, for one call of ``generate`` or, kept, for one call after another."""

from __future__ import annotations

from typing import Any

import torch

from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.types import KVCache

BLOCK_SIZE = 16

_Kind = tuple[int, int, torch.dtype, torch.device]


class KVMemory:
    """Tensors by layer, made when a layer is first used and as many blocks long as all of them.

    Attributes:
        caches: Paged tensors by layer. The same dictionary always.
        num_blocks: Blocks of each layer.
        version: Counts changes of addresses.
    """

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.caches: dict[int, KVCache] = {}
        self.version = 0
        self._pools: dict[int, KVCachePool] = {}
        self._kinds: dict[int, _Kind] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(pool.bytes_per_block * pool.num_blocks for pool in self._pools.values())

    @property
    def may_be_kept(self) -> bool:
        """Whether it is no more than a quarter of its device, which others need between the calls."""
        devices = {kind[3] for kind in self._kinds.values() if kind[3].type == "cuda"}
        return all(self.num_bytes <= torch.cuda.get_device_properties(d).total_memory // 4 for d in devices)

    def ensure_layer(self, layer: int, key: torch.Tensor) -> None:
        """Make the layer's tensors, on its first use, for keys and values ``[B, heads, S, head_dim]``."""
        kind = (key.shape[1], key.shape[3], key.dtype, key.device)
        if self._kinds.get(layer) != kind:
            self._kinds[layer] = kind
            self._make(layer)

    def grow(self, num_blocks: int) -> None:
        """Make room for so many blocks; those that exist keep their contents."""
        self.num_blocks = num_blocks
        for layer in list(self._pools):
            old = self.caches[layer]
            self._make(layer)
            for source, target in zip(old, self.caches[layer], strict=True):
                target[: len(source)].copy_(source)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks in every layer: pairs (source, destination)."""
        for pool in self._pools.values():
            pool.copy(pairs)

    def _make(self, layer: int) -> None:
        heads, dim, dtype, device = self._kinds[layer]
        # What is kept from a call under inference mode would be closed to all that run without it.
        with torch.inference_mode(False):
            pool = KVCachePool([(heads, dim)], self.num_blocks, BLOCK_SIZE, dtype, device)
        self._pools[layer], self.caches[layer] = pool, pool.caches[0]
        self.version += 1


def blocks_for(rows: int, length: int, config: Any, itemsize: int, device: torch.device) -> int:
    """Blocks that ``rows`` sequences of ``length`` tokens can need, copies on write included.

    No more than fit into half of what the device has free: a generation may end long before its limit, and memory that
    turns out to be too small grows.
    """
    wanted = rows * (-(-length // BLOCK_SIZE) + 1)
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    unused = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(wanted, unused // 2 // block_bytes(config, itemsize))


def block_bytes(config: Any, itemsize: int) -> int:
    """About what a block of all layers takes, by a text decoder's configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * BLOCK_SIZE * config.num_hidden_layers * heads * dim * itemsize)
