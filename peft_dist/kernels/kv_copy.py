"""KV blocks of a pool to a flat piece of host memory and back, beside the steps that use the other blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from peft_dist.kernels.kv_pool import KVCachePool


def read_blocks(pool: KVCachePool, blocks: Sequence[int], out: torch.Tensor, *, on_host: bool = False) -> None:
    """Copy blocks, in their order, to host memory; returns once they are there.

    On a GPU the copies run on a stream of their own: nothing that is queued may still write to these blocks.

    Args:
        out: uint8 ``[len(blocks) * pool.bytes_per_block]`` on the CPU.
        on_host: The blocks are the pool's host blocks.
    """
    index = torch.tensor(blocks, dtype=torch.long)
    with torch.no_grad():
        for group, part in _parts(pool, len(blocks), out, on_host=on_host):
            if group.is_cuda:
                _from_gpu(group, index, part)
            else:
                torch.index_select(group, 2, index, out=part)


def write_blocks(pool: KVCachePool, blocks: Sequence[int], source: torch.Tensor) -> None:
    """Fill device blocks with what ``read_blocks`` copied from a pool of the same layout; returns when it is done.

    On a GPU on a stream of its own: nothing that is queued may touch these blocks.

    Args:
        source: uint8 ``[len(blocks) * pool.bytes_per_block]`` on the CPU.
    """
    index = torch.tensor(blocks, dtype=torch.long)
    with torch.no_grad():
        for group, part in _parts(pool, len(blocks), source):
            if group.is_cuda:
                _to_gpu(group, index, part)
            else:
                group.index_copy_(2, index, part)


def _parts(
    pool: KVCachePool, num_blocks: int, flat: torch.Tensor, *, on_host: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each group of layers, and its share ``[layers, 2, num_blocks, block_size, kv_heads, head_dim]`` of the memory."""
    values, first = flat.view(pool.dtype), 0
    for group in pool.groups(on_host=on_host):
        shape = (*group.shape[:2], num_blocks, *group.shape[3:])
        size = torch.Size(shape).numel()
        yield group, values[first : first + size].view(shape)
        first += size


def _from_gpu(group: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Layer by layer through pinned memory: without it the driver would hold up every other call meanwhile."""
    stream = torch.cuda.Stream(group.device)
    with torch.cuda.stream(stream):
        rows = index.to(group.device)
        pinned = torch.empty(out.shape[1:], dtype=out.dtype, pin_memory=True)
        for layer, part in zip(group, out, strict=True):
            pinned.copy_(layer.index_select(1, rows), non_blocking=True)
            stream.synchronize()
            part.copy_(pinned)


def _to_gpu(group: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
    stream = torch.cuda.Stream(group.device)
    with torch.cuda.stream(stream):
        rows = index.to(group.device)
        pinned = torch.empty(source.shape[1:], dtype=source.dtype, pin_memory=True)
        for layer, part in zip(group, source, strict=True):
            pinned.copy_(part)
            layer.index_copy_(1, rows, pinned.to(group.device, non_blocking=True))
            stream.synchronize()
