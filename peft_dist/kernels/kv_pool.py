"""Device and host memory behind KV block ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_dist.kernels.types import KVCache

Shape = tuple[int, int]
Pairs = Sequence[tuple[int, int]]


class KVCachePool:
    """Paged keys and values of every layer, and room on the host for blocks that were swapped out.

    Layers of one shape share a tensor, so moving blocks is a few calls however many layers there are.

    Args:
        shapes: (num_kv_heads, head_dim) of each layer.
        num_blocks, block_size: Blocks on the device, and tokens in each.
        num_host_blocks: Blocks in host memory (pinned when the device is a GPU).

    Attributes:
        caches: ``KVCache`` of each layer, in the order of ``shapes``.
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
        pinned = self.device.type == "cuda"
        self._device = {s: self._allocate(n, s, num_blocks, self.device) for s, n in layers.items()}
        self._host = {s: self._allocate(n, s, num_host_blocks, torch.device("cpu"), pinned) for s, n in layers.items()}
        self.caches = self._views()

    def _allocate(
        self, num_layers: int, shape: Shape, num_blocks: int, device: torch.device, pinned: bool = False
    ) -> torch.Tensor:
        size = (num_layers, 2, num_blocks, self.block_size, *shape)
        return torch.zeros(size, dtype=self.dtype, device=device, pin_memory=pinned and num_blocks > 0)

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
        return list((self._host if on_host else self._device).values())

    def swap_out(self, pairs: Pairs) -> None:
        """Copy device blocks to host blocks: pairs (device, host)."""
        self._transfer(self._device, self._host, pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy host blocks to device blocks: pairs (host, device)."""
        self._transfer(self._host, self._device, pairs)

    def copy(self, pairs: Pairs) -> None:
        """Copy device blocks to device blocks: pairs (source, destination). All sources are read first."""
        self._transfer(self._device, self._device, pairs)

    @staticmethod
    def _transfer(source: dict[Shape, torch.Tensor], target: dict[Shape, torch.Tensor], pairs: Pairs) -> None:
        if not pairs:
            return
        index = torch.tensor(pairs, dtype=torch.long)
        with torch.no_grad():
            for shape, origin in source.items():
                blocks = origin.index_select(2, index[:, 0].to(origin.device))
                destination = target[shape]
                destination.index_copy_(2, index[:, 1].to(destination.device), blocks.to(destination.device))


def block_bytes(shapes: Sequence[Shape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers of these (num_kv_heads, head_dim), keys and values."""
    per_token = sum(num_heads * head_dim for num_heads, head_dim in shapes)
    return int(2 * block_size * per_token * dtype.itemsize)
