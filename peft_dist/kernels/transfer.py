"""From host memory to a device, without waiting for either."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which lies in host memory; for a GPU its copy is queued, so that nobody waits."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
