"""What steps, switches and copies can be expected to take on this device, before any was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from peft_dist.core.cost_model import CostPrior

# What a step costs the host, and a copy its launch.
OVERHEAD = 1e-3
# What the LoRA kernels add to a step and to each token, as a share of the base's.
LORA_SHARE = 0.2
# Page-locked host memory to a GPU and back: a 16-lane PCIe 4 link. It would take too long to measure.
LINK_BYTES_PER_SECOND = 2.5e10
_COPY_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
# Rows and width of the product that is timed: large enough for the device's speed, small enough for milliseconds.
_PRODUCT = {"cpu": (64, 512), "cuda": (4096, 4096)}
_TIMES = 6


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """
    Attributes:
        bytes_per_second: Read and written by a copy on the device.
        flops_per_second: Of a matrix product in the model's type.
        link_bytes_per_second: Copied between the host and the device.
    """

    bytes_per_second: float
    flops_per_second: float
    link_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters of a model, and the bytes they take."""

    num_weights: int
    num_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelSize:
        weights = list(model.parameters())
        return cls(sum(weight.numel() for weight in weights), sum(weight.nbytes for weight in weights))


def measure_speed(device: torch.device, dtype: torch.dtype) -> DeviceSpeed:
    """Some hundredths of a second of copying and multiplying."""
    copying = _copy_speed(device)
    flops = _product_speed(device, dtype)
    if device.type == "cuda":
        # Whoever counts what is left of the device's memory sees it all.
        torch.cuda.empty_cache()
    # On a CPU the "device" is host memory too, and every byte copied is read and written.
    return DeviceSpeed(copying, flops, LINK_BYTES_PER_SECOND if device.type == "cuda" else copying / 2)


def _copy_speed(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second."""
    rows, width = _PRODUCT[device.type]
    left = torch.ones(rows, width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    return 2 * rows * width * width / _seconds(device, lambda: torch.mm(left, right))


def device_prior(speed: DeviceSpeed, model: ModelSize, row_bytes: int, num_modules: int, merge_way: str) -> CostPrior:
    """From what the work moves and computes: a step reads all weights, a token multiplies with each of them.

    Args:
        model: The base.
        row_bytes: Of one rank row of A and B in every module, together.
        num_modules: How many these are. An adapter's rank rows are counted in each (``AdapterSpec.num_rank_rows``).
        merge_way: As in ``ModelInfo``.
    """
    step = OVERHEAD + model.num_bytes / speed.bytes_per_second
    token = 2 * model.num_weights / speed.flops_per_second
    rewriting = 2 * model.num_bytes / speed.bytes_per_second
    from_host = OVERHEAD + model.num_bytes / speed.link_bytes_per_second
    copy = (OVERHEAD, 1 / speed.link_bytes_per_second)
    return CostPrior(
        step=step,
        decode_sequence=token,
        prefill_token=token,
        lora_step=LORA_SHARE * step,
        lora_token=LORA_SHARE * token,
        adapter=0.0,
        rank_row=row_bytes / num_modules / speed.bytes_per_second,
        # The products B A compute with a rank row in every module what a step does with a token.
        merge=(from_host, 0.0) if merge_way == "models" else (OVERHEAD + rewriting, token / num_modules),
        # Beside merged weights in memory of their own, the base's are still there.
        unmerge=(from_host, 0.0) if merge_way == "host" else (0.0, 0.0),
        load=copy,
        swap=copy,
        # Out and in again, through memory that is touched for the first time.
        transfer=(OVERHEAD, 4 / speed.link_bytes_per_second),
    )


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The least of some times of ``work``: others may have the machine meanwhile."""
    least = math.inf
    for _ in range(_TIMES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - began)
    return max(least, 1e-9)
