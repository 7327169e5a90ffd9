"""Results on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HostCopy:
    """Tensors that are copied to the host behind the work queued so far, and not behind what is queued later.

    ``Tensor.tolist()`` would wait for everything on the stream: for the next step too, which is queued before the
    last one's tokens are read.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host; returns once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
