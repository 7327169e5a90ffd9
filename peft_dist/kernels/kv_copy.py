"""KV blocks of a pool to a flat piece of host memory and back, beside the steps that use the other blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from peft_dist.kernels.kv_pool import KVCachePool

# What is on its way between a GPU and host memory at once, and taken on both sides for that.
_PIECE_BYTES = 16 << 20


class FlatMemory(Protocol):
    """Memory that is reached by copies alone, which a GPU's are queued on its current stream."""

    def put(self, offset: int, piece: torch.Tensor) -> None:
        """Copy a contiguous tensor of the pool's device there, from this byte on."""
        ...

    def get(self, offset: int, piece: torch.Tensor) -> None:
        """Fill a contiguous tensor of the pool's device."""
        ...


class KVCopier:
    """Copies blocks of one pool, for one thread. Calls return when the copy is done.

    On a GPU everything runs on a stream of its own, in pieces through pinned memory (without it the driver would hold
    up other calls), behind the swaps that were queued by then: no other work that is queued may still write to blocks
    that are read, or touch those that are written.
    """

    def __init__(self, pool: KVCachePool) -> None:
        self._pool = pool
        self._stream: torch.cuda.Stream | None = None
        self._pinned: torch.Tensor | None = None

    def read(self, blocks: Sequence[int], out: torch.Tensor, *, on_host: bool = False) -> None:
        """Copy blocks, in their order, to host memory.

        Args:
            out: uint8 ``[len(blocks) * pool.bytes_per_block]`` on the CPU.
            on_host: The blocks are the pool's host blocks.
        """
        if on_host and (swapped := self._pool.swapped) is not None:
            swapped.synchronize()
        index = torch.tensor(blocks, dtype=torch.long)
        with torch.no_grad():
            for group, part in self._parts(len(blocks), out, on_host=on_host):
                if group.is_cuda:
                    self._from_gpu(group, index, part)
                else:
                    torch.index_select(group, 2, index, out=part)

    def write(self, blocks: Sequence[int], source: torch.Tensor) -> None:
        """Fill device blocks with what ``read`` copied from a pool of the same layout.

        Args:
            source: uint8 ``[len(blocks) * pool.bytes_per_block]`` on the CPU.
        """
        index = torch.tensor(blocks, dtype=torch.long)
        with torch.no_grad():
            for group, part in self._parts(len(blocks), source, on_host=False):
                if group.is_cuda:
                    self._to_gpu(group, index, part)
                else:
                    group.index_copy_(2, index, part)

    def read_into(self, blocks: Sequence[int], memory: FlatMemory) -> None:
        """As ``read``, without a way through the host: from the device's blocks to memory of ``read``'s layout."""
        index = torch.tensor(blocks, dtype=torch.long)
        for group, start in self._shares(len(blocks)):
            with torch.no_grad(), self._beside(group):
                rows = index.to(group.device)
                for layer, first, last, offsets in _flat_pieces(group, len(blocks), start):
                    piece = group[layer].index_select(1, rows[first:last])
                    for half, offset in enumerate(offsets):
                        memory.put(offset, piece[half])

    def write_from(self, blocks: Sequence[int], memory: FlatMemory) -> None:
        """As ``write``, from what ``read_into`` filled."""
        index = torch.tensor(blocks, dtype=torch.long)
        for group, start in self._shares(len(blocks)):
            with torch.no_grad(), self._beside(group):
                rows = index.to(group.device)
                for layer, first, last, offsets in _flat_pieces(group, len(blocks), start):
                    piece = group.new_empty((2, last - first, *group.shape[3:]))
                    for half, offset in enumerate(offsets):
                        memory.get(offset, piece[half])
                    group[layer].index_copy_(1, rows[first:last], piece)

    def _shares(self, num_blocks: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Each group of layers, and the byte where its share ``[layers, 2, num_blocks, ...]`` of flat memory begins."""
        start = 0
        for group in self._pool.groups():
            yield group, start
            start += len(group) * 2 * num_blocks * group[0, 0, 0].nbytes

    @contextlib.contextmanager
    def _beside(self, group: torch.Tensor) -> Iterator[None]:
        """On a GPU: on the stream of the copies, whose work is done at the end, however that comes."""
        if not group.is_cuda:
            yield
            return
        stream = self._stream_on(group.device)
        with torch.cuda.stream(stream):
            try:
                yield
            finally:
                stream.synchronize()

    def _parts(
        self, num_blocks: int, flat: torch.Tensor, *, on_host: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each group of layers, and its share ``[layers, 2, num_blocks, block_size, kv_heads, head_dim]`` of it."""
        values, first = flat.view(self._pool.dtype), 0
        for group in self._pool.groups(on_host=on_host):
            shape = torch.Size((*group.shape[:2], num_blocks, *group.shape[3:]))
            yield group, values[first : first + shape.numel()].view(shape)
            first += shape.numel()

    def _from_gpu(self, group: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        stream = self._stream_on(group.device)
        with torch.cuda.stream(stream):
            rows = index.to(group.device)
            for layer, first, last, pinned in self._pieces(out):
                pinned.copy_(group[layer].index_select(1, rows[first:last]), non_blocking=True)
                stream.synchronize()
                out[layer, :, first:last] = pinned

    def _to_gpu(self, group: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
        stream = self._stream_on(group.device)
        with torch.cuda.stream(stream):
            rows = index.to(group.device)
            for layer, first, last, pinned in self._pieces(source):
                pinned.copy_(source[layer, :, first:last])
                group[layer].index_copy_(1, rows[first:last], pinned.to(group.device, non_blocking=True))
                stream.synchronize()

    def _stream_on(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        if (swapped := self._pool.swapped) is not None:
            self._stream.wait_event(swapped)
        return self._stream

    def _pieces(self, part: torch.Tensor) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """Layer, first and last block of each piece of ``part``, and pinned memory ``[2, blocks, ...]`` for it."""
        block = part[0, :, :1]
        at_once = max(1, _PIECE_BYTES // block.nbytes)
        for layer in range(len(part)):
            for first in range(0, part.shape[2], at_once):
                last = min(first + at_once, part.shape[2])
                yield layer, first, last, self._pinned_like(part[layer, :, first:last])

    def _pinned_like(self, piece: torch.Tensor) -> torch.Tensor:
        if self._pinned is None or self._pinned.nbytes < piece.nbytes:
            self._pinned = torch.empty(max(piece.nbytes, _PIECE_BYTES), dtype=torch.uint8, pin_memory=True)
        return self._pinned[: piece.nbytes].view(piece.dtype).view(piece.shape)


def _flat_pieces(group: torch.Tensor, num_blocks: int, start: int) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """Layer, first and last block of each piece, and where its keys and its values lie, in bytes; see ``_shares``."""
    block = group[0, 0, 0].nbytes
    at_once = max(1, _PIECE_BYTES // (2 * block))
    for layer in range(len(group)):
        keys = start + 2 * layer * num_blocks * block
        for first in range(0, num_blocks, at_once):
            offset = keys + first * block
            yield layer, first, min(first + at_once, num_blocks), (offset, offset + num_blocks * block)
