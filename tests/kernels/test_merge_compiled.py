"""The merge from the pool compiles for sm_90 as it is meant to be: 16 bytes at a time, products by tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_the_merge_compiles_for_sm_90() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiled_merge.py")],
        capture_output=True, text=True, env=environment, check=False, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) == 8
    for name, found in results.items():
        # A handful of registers, not a tile; and two programs of eight warps fit a multiprocessor.
        assert found["stack"] <= 64 and found["registers"] <= 128 and found["shared"] <= 50_000, f"{name}: {found}"
        loads = {kind: count for kind, count in found.items() if kind.startswith("ld.global.L1::evict_first")}
        assert loads and all(kind.endswith("v4.b32") for kind in loads), f"{name}, weights: {found}"
        stores = {kind for kind in found if kind.startswith("st.global")}
        assert stores and all(kind.endswith("v4.b32") for kind in stores), f"{name}, results: {found}"
        assert bool(found.get("mma.mma_async")) == ("fp32, fp32" not in name), f"{name}: {found}"
