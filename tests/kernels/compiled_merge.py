"""Compile the merge from the LoRA pool for sm_90 without a GPU, and print what became of it as JSON; a program, as
``compiled_lora.py`` is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from peft_dist.kernels.merge_pool_triton import merge_pool_kernel, tile_of
from peft_dist.kernels.triton_device import triton_type
from tests.kernels.compiled_lora import compile_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# As the launcher passes them for an 8B Llama, whose sizes are all multiples of 16.
KINDS = {
    "table": "*i64:16", "slot": "i32", "num_rows": "i32:16", "num_columns": "i32:16", "out_stride": "i32:16",
    "base_stride": "i32:16",
}  # fmt: skip


def compile_merge(weight: str, adapter: str, rank: int, aligned: bool = True) -> dict[str, Any]:
    tile = tile_of(DTYPES[weight], DTYPES[adapter], rank)
    return compile_kernel(
        merge_pool_kernel, weight, tile.warps, 3, KINDS, W=triton_type(DTYPES[weight]), P=triton_type(DTYPES[adapter]),
        PAGE=8, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_RANK=tile.ranks, ALIGNED=aligned,
        registers=tile.registers,
    )  # fmt: skip


def main() -> None:
    results = {
        f"{weight}, {adapter}, rank {rank}": compile_merge(weight, adapter, rank)
        for weight, adapter in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"))
        for rank in (16, 64)
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
