"""Which implementation of the kernels runs."""

from __future__ import annotations

import logging

import torch

from peft_dist.kernels import cpu_build

logger = logging.getLogger(__name__)


def choose(device: torch.device | str, compile_kernels: bool = True, dtype: torch.dtype = torch.float32) -> str:
    """Name of the best back end, "c" or "torch", built and ready: what goes into ``backend`` of plans and metadata.

    Args:
        device: Where the model runs.
        compile_kernels: Allow building the C kernels on first use (CPU only; needs gcc).
        dtype: Type of the model's activations.
    """
    usable = compile_kernels and torch.device(device).type == "cpu" and cpu_build.library(dtype) is not None
    name = "c" if usable else "torch"
    logger.info("kernels for %s on %s: %s", dtype, device, name)
    return name
