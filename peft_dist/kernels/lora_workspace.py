"""Memory in which the two halves of a LoRA product meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peft_dist.kernels.lora_plans import rank_room
from peft_dist.kernels.lora_room import fixed_bytes

# Torch takes the highest priority that there is.
_FIRST = -5


class LoRAWorkspace:
    """One float32 buffer on a device, for one call after another on one stream (or streams ordered by what they read).

    Attributes:
        max_rank: Room for each row's rank intermediate, a power of two; kernels are launched for it. When an adapter of
            a higher rank comes it grows, and graphs that were captured before must be captured again.
        ranks: What launches of captured steps are made for (``lora_plans.rank_room``). When it grows, steps that were
            captured before are right, but slow.
        per_rank: Numbers for each of ``max_rank`` that its buffer has from the first on (``lora_room``), so that a
            larger step needs no larger one.
        stream: For the first half beside a layer's own product; None on a CPU, or to have no such half.
    """

    def __init__(self, device: torch.device | str, max_rank: int = 64) -> None:
        self.device = torch.device(device)
        self.max_rank, self.ranks, self.per_rank = 16, rank_room(1), 0
        # First: both halves become ready together, and the layer's own product, begun first, would leave no room.
        self.stream = torch.cuda.Stream(self.device, priority=_FIRST) if self.device.type == "cuda" else None
        self._held = {dtype: torch.empty(0, dtype=dtype, device=self.device) for dtype in (torch.float32, torch.int32)}
        self._in_graphs: set[torch.dtype] = set()
        self._outgrown: list[torch.Tensor] = []
        self._make_room(max_rank)

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds now, those of outgrown buffers included."""
        return sum(buffer.nbytes for buffer in (*self._held.values(), *self._outgrown))

    def admit(self, rank: int) -> None:
        """Make sure that ``max_rank`` is at least this, and that launches are made for it."""
        self._make_room(rank)
        self.ranks = max(self.ranks, rank_room(rank))

    def bytes_with(self, rank: int) -> int:
        """What it takes at most where ``per_rank`` holds of all steps, and no adapter has more than ``rank``."""
        return 4 * self.per_rank * self._room_for(rank) + fixed_bytes()

    def _make_room(self, rank: int) -> None:
        self.max_rank = self._room_for(rank)

    def _room_for(self, rank: int) -> int:
        return max(self.max_rank, 1 << (rank - 1).bit_length()) if rank else self.max_rank

    @contextmanager
    def made_for(self, ranks: int) -> Iterator[None]:
        """Launches that are captured meanwhile are made for so many ranks: no adapter in them has more."""
        before, self.ranks = self.ranks, ranks
        try:
            yield
        finally:
            self.ranks = before

    def take(self, num_elements: int) -> torch.Tensor:
        """At least so many float32 elements, which hold anything. The address stays until more are asked for than ever.

        A buffer that became too small is kept where a graph was captured with it, which writes to it.
        """
        size = max(num_elements, self.per_rank * self.max_rank)
        if size > self._held[torch.float32].numel():
            self._replace(torch.empty(size, dtype=torch.float32, device=self.device))
        return self._given(torch.float32)

    def take_counters(self, count: int) -> torch.Tensor:
        """At least so many int32 zeros at an address that stays as that of ``take`` does; who uses them puts them back
        to 0."""
        if count > self._held[torch.int32].numel():
            self._replace(torch.zeros(count, dtype=torch.int32, device=self.device))
        return self._given(torch.int32)

    def forget_graphs(self) -> None:
        """No graph that was captured with it is replayed any more: free outgrown buffers.

        Replays that are still queued may use them: torch gives their memory to what is queued later, on the streams
        that all launches of adapters are ordered on.
        """
        self._outgrown.clear()
        self._in_graphs.clear()

    def _given(self, dtype: torch.dtype) -> torch.Tensor:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._in_graphs.add(dtype)
        return self._held[dtype]

    def _replace(self, buffer: torch.Tensor) -> None:
        if buffer.dtype in self._in_graphs:
            self._outgrown.append(self._held[buffer.dtype])
            self._in_graphs.discard(buffer.dtype)
        self._held[buffer.dtype] = buffer
