"""Whether a device can still do anything for this process, and what it has given it."""

from __future__ import annotations

import resource

import torch

from peft_dist.core.errors import DeviceLostError


def check_device(device: torch.device) -> None:
    """Raises DeviceLostError when it cannot. Waits for nothing that is queued there; a CPU always can.

    An illegal access, or an assertion that fails in a kernel, takes the whole context with it: from then on every call
    gets that error, also one that has nothing to do with it. To run out of memory does not.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.current_stream(device).query()
    except RuntimeError as error:
        raise DeviceLostError(
            f"{device} can do nothing more for this process ({error}): start the replica again, as --restart and "
            "several replicas do; CUDA_LAUNCH_BLOCKING=1 shows which call it was"
        ) from error


def peak_memory_bytes(device: torch.device) -> int:
    """What torch has reserved on a GPU at most, captured steps included; on a CPU the largest resident set so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
