"""Compile the LoRA kernels for sm_90 without a GPU, and print what became of them as JSON. Run as a program, because
the tests' own process has Triton's interpreter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_dist.kernels.lora_embedding_triton import _embedding_kernel
from peft_dist.kernels.lora_expand_loop import expand_loop_kernel
from peft_dist.kernels.lora_gate_loop import gate_loop_kernel
from peft_dist.kernels.lora_gate_triton import _gate_kernel
from peft_dist.kernels.lora_plans import GroupPlan, GroupShape, default_plan
from peft_dist.kernels.lora_triton_kernels import expand_kernel, shrink_kernel

ALIGNED = ["tt.divisibility", 16]
# What the launchers pass: aligned tensors, and tables that begin at the third column of their rows.
KINDS = {"partials": "*fp32", "scalings": "*fp32", "factor": "fp32", "ids": "*i64", "max_rank": "i32"}
TABLES = ("tile_rows", "tile_slots", "tile_lens", "ranks")
UNALIGNED = ("pages", "scalings", "factor")


def compile_kernel(
    kernel: Any,
    dtype: str,
    warps: int,
    stages: int,
    kinds: dict[str, str] | None = None,
    registers: int | None = None,
    **constants: Any,
) -> dict[str, Any]:
    """Registers, bytes spilt, shared memory, and how often each kind of load, store and product is there.

    Args:
        kinds: Of arguments that are not those of LoRA kernels; aligned where the type is followed by a ``:16``.
        registers: At most so many a thread.
    """
    signature, known, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        base = re.sub(r"^(gate|up)_|[012]$", "", name)
        if kinds and name in kinds:
            signature[name], _, aligned = kinds[name].partition(":")
            attributes.update({(i,): [ALIGNED]} if aligned else {})
            continue
        if name in constants:
            signature[name], known[(i,)] = "constexpr", constants[name]
            continue
        is_tensor = base in ("x", "y", "A", "B", "gate", "up", "out", "pages", *TABLES)
        small = "*i32" if base in ("pages", *TABLES) else f"*{dtype}"
        signature[name] = KINDS.get(base, small if is_tensor else "i32")
        if (is_tensor or base in KINDS) and base not in UNALIGNED:
            attributes[(i,)] = [ALIGNED]
    source = ASTSource(kernel, signature, known, attributes)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    operations = Counter(
        re.findall(r"(ld\.global[.\w:]*|st\.global[.\w:]*|mma[._]\w+|griddep\w+\.\w+)", built.asm["ptx"])
    )
    operations.update(f"cp.async {int(size, 16)}" for size in re.findall(r"cp\.async\.c.*?, (0x\w+)", built.asm["ptx"]))
    return {
        "registers": int(found[1]), "stack": int(found[2]), "shared": built.metadata.shared, **operations,
    }  # fmt: skip


def compile_loops(
    dtype: str, plan: GroupPlan, group: dict[str, Any], ends: dict[str, int], strides: dict[str, int]
) -> dict[str, dict[str, Any]]:
    group = {name: value for name, value in group.items() if name != "WIDE"}
    blocks = {"PART_N": plan.loop_part, "STAGES": plan.loop_stages, "RANKS": plan.ranks}
    return {
        **{
            f"expand loop{'' if adds else ', parts alone'}": compile_kernel(
                expand_loop_kernel, dtype, plan.expand_warps, 3, **group, **ends, **blocks, BLOCK_N=plan.loop_n,
                SHARES=plan.loop_shares, ADDS=adds,
            )
            for adds in (True, False)
        },
        "gate loop": compile_kernel(
            gate_loop_kernel, dtype, plan.gate_warps, 3, **{**group, "GROUP": 2}, **strides, N=ends["N0"], SILU=True,
            BLOCK_N=plan.gate_loop_n, SHARES=plan.gate_loop_shares, **{**blocks, "PART_N": plan.loop_part // 2},
        ),
    }  # fmt: skip


def compile_all(shape: GroupShape, dtype: str, pdl: bool) -> dict[str, dict[str, Any]]:
    wide = dtype == "fp32"
    plan: GroupPlan = default_plan(shape)
    plan = plan.in_float32() if wide else plan
    outs = [*shape.out_features, *[shape.out_features[0]] * 2][:3]
    total = sum(shape.out_features)
    common = {"PAGE": 8, "TILE": shape.tile_rows, "WIDE": wide}
    group = {**common, "BY_TILE": shape.tile_rows == 16, "GROUP": len(shape.out_features), "SPLIT": plan.split}
    ends = {f"N{i}": n for i, n in enumerate(outs)} | {f"Y_STRIDE{i}": total for i in range(3)}
    strides = {"GATE_STRIDE": 2 * outs[0], "UP_STRIDE": 2 * outs[0], "OUT_STRIDE": outs[0]}
    return {
        "shrink": compile_kernel(
            shrink_kernel, dtype, plan.shrink_warps, plan.shrink_stages, **group, K=shape.in_features,
            X_STRIDE=shape.in_features, BLOCK_K=plan.block_k, BLOCK_R=plan.shrink_r, PDL=False,
            RANK_PARTS=plan.rank_parts,
        ),
        "expand": compile_kernel(
            expand_kernel, dtype, plan.expand_warps, 3, **group, **ends,
            BLOCK_N=plan.block_n, PART_N=min(plan.block_n, plan.part_n), FEW=plan.few_rows, PDL=pdl, ADDS=True,
        ),
        "gate": compile_kernel(
            _gate_kernel, dtype, plan.gate_warps, 3, **{**group, "GROUP": 2}, **strides, N=outs[0],
            BLOCK_N=plan.gate_n, PART_N=min(plan.gate_n, plan.gate_part_n), FEW=plan.few_rows, SILU=True, PDL=pdl,
        ),
        **(compile_loops(dtype, plan, group, ends, strides) if plan.loop_n else {}),
        "embedding": compile_kernel(
            _embedding_kernel, dtype, 8 if wide else 4, 3, **common, V=128256, N=4096, Y_STRIDE=4096,
            BLOCK_N=32 if wide else 64,
        ),
    }  # fmt: skip


def main() -> None:
    shapes = {
        "decode of one": GroupShape(16, 1, 4096, (4096, 1024, 1024)),
        "decode": GroupShape(16, 32, 4096, (14336, 14336)),
        "mixed": GroupShape(32, 32, 14336, (4096,)),
        "prefill": GroupShape(64, 64, 4096, (4096, 1024, 1024)),
        "long prefill": GroupShape(128, 16, 4096, (4096, 1024, 1024)),
    }
    results = {
        f"{name}, {dtype}": compile_all(shape, dtype, pdl=name == "decode of one")
        for name, shape in shapes.items()
        for dtype in sys.argv[1:] or ("bf16", "fp16", "fp32")
    }
    # Of higher ranks, whose expands keep more in registers and in shared memory.
    gate = shapes["decode"]
    results |= {
        f"decode of rank {ranks}, bf16": compile_all(gate._replace(max_tiles=64, ranks=ranks), "bf16", pdl=False)
        for ranks in (64, 128)
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
