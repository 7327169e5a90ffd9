"""Which implementation of the kernels runs."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

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


def choose_lora(device: torch.device | str, compile_kernels: bool = True, dtype: torch.dtype = torch.float32) -> str:
    """What goes into ``LoRAPlan.backend``: "triton" on a GPU that has Triton, else what ``choose`` says."""
    if torch.device(device).type != "cuda" or not has_triton():
        return choose(device, compile_kernels, dtype)
    logger.info("LoRA kernels for %s on %s: triton", dtype, device)
    return "triton"


@cache
def has_triton() -> bool:
    """Whether the package is there; it is imported when a kernel is first called."""
    return find_spec("triton") is not None
