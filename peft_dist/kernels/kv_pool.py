"""Device and host memory behind KV block ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.types import KVCache

Shape = tuple[int, int]
Pairs = Sequence[tuple[int, int]]

# What swapping takes of a device at once, beside the blocks.
_PIECE_BYTES = 64 << 20


class KVCachePool:
    """Paged keys and values of every layer, and room on the host for blocks that were swapped out.

    Layers of one shape share a tensor, so moving blocks is a few calls however many layers there are.

    Args:
        shapes: (num_kv_heads, head_dim) of each layer.
        num_blocks, block_size: Blocks on the device, and tokens in each.
        num_host_blocks: Blocks in host memory (pinned when the device is a GPU).

    Attributes:
        caches: ``KVCache`` of each layer, in the order of ``shapes``.
        swapped: On a GPU, when the swaps that were queued last are done; None before the first. Whoever touches blocks
            on another stream, or host blocks, has to wait for it.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_host_blocks: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.num_blocks, self.block_size, self.num_host_blocks = num_blocks, block_size, num_host_blocks
        self.dtype = dtype
        self._shapes = list(shapes)
        layers = {shape: self._shapes.count(shape) for shape in self._shapes}
        self._device = {
            shape: torch.zeros((count, 2, num_blocks, block_size, *shape), dtype=dtype, device=self.device)
            for shape, count in layers.items()
        }
        # By blocks, of which each is one copy then.
        pinned = self.device.type == "cuda" and num_host_blocks > 0
        self._host = {
            shape: torch.zeros((num_host_blocks, count, 2, block_size, *shape), dtype=dtype, pin_memory=pinned)
            for shape, count in layers.items()
        }
        self.swapped: torch.cuda.Event | None = None
        self.caches = self._views()

    def _views(self) -> list[KVCache]:
        layers = {shape: iter(tensor.unbind(0)) for shape, tensor in self._device.items()}
        return [KVCache(*next(layers[shape]).unbind(0)) for shape in self._shapes]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return block_bytes(self._shapes, self.block_size, self.dtype)

    @property
    def layout(self) -> str:
        """What two pools must agree on for one to take the other's blocks."""
        return f"{self._shapes} {self.block_size} {str(self.dtype).removeprefix('torch.')}"

    def groups(self, *, on_host: bool = False) -> list[torch.Tensor]:
        """``[layers, 2, blocks, block_size, kv_heads, head_dim]`` of the layers of each shape."""
        if on_host:
            return [group.permute(1, 2, 0, 3, 4, 5) for group in self._host.values()]
        return list(self._device.values())

    def swap_out(self, pairs: Pairs) -> None:
        """Copy device blocks to host blocks: pairs (device, host). On a GPU queued on its current stream, as is what
        uses these blocks before and after; nobody waits."""
        for device, host, part in self._pieces(pairs):
            index = to_device(torch.tensor([source for source, _ in part]), self.device)
            with torch.no_grad():
                blocks = device.permute(2, 0, 1, 3, 4, 5).index_select(0, index)
                for block, (_, place) in zip(blocks.unbind(), part, strict=True):
                    host[place].copy_(block, non_blocking=True)
        self._note_swaps(pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy host blocks to device blocks: pairs (host, device). Queued as ``swap_out`` is."""
        for device, host, part in self._pieces(pairs):
            index = to_device(torch.tensor([target for _, target in part]), self.device)
            with torch.no_grad():
                blocks = device.new_empty((len(part), *host.shape[1:]))
                for block, (place, _) in zip(blocks.unbind(), part, strict=True):
                    block.copy_(host[place], non_blocking=True)
                device.index_copy_(2, index, blocks.permute(1, 2, 0, 3, 4, 5))
        self._note_swaps(pairs)

    def copy(self, pairs: Pairs) -> None:
        """Copy device blocks to device blocks: pairs (source, destination). All sources are read first."""
        if not pairs:
            return
        sources, targets = to_device(torch.tensor(pairs, dtype=torch.long).T.contiguous(), self.device)
        with torch.no_grad():
            for group in self._device.values():
                group.index_copy_(2, targets, group.index_select(2, sources))

    def _pieces(self, pairs: Pairs) -> Iterator[tuple[torch.Tensor, torch.Tensor, Pairs]]:
        """Layers of one shape on the device and on the host, and pairs of blocks that are few bytes together."""
        for shape, device in self._device.items():
            host = self._host[shape]
            at_once = max(1, _PIECE_BYTES // (host.nbytes // len(host))) if pairs else 1
            for first in range(0, len(pairs), at_once):
                yield device, host, pairs[first : first + at_once]

    def _note_swaps(self, pairs: Pairs) -> None:
        if pairs and self.device.type == "cuda":
            # A new one: another thread may be waiting for the last.
            done = torch.cuda.Event()
            done.record()
            self.swapped = done


def block_bytes(shapes: Sequence[Shape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers of these (num_kv_heads, head_dim), keys and values."""
    per_token = sum(num_heads * head_dim for num_heads, head_dim in shapes)
    return int(2 * block_size * per_token * dtype.itemsize)
