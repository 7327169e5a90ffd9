"""A replica that was just started merges an adapter that all its requests ask for, by what it expects of its device."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from demo_model import ensure_demo_model

from peft_dist.core.config import EngineConfig
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner.replica import build_replica

pytestmark = pytest.mark.slow


def test_smollm2_merges_without_having_merged_before(tmp_path: Path) -> None:
    """Of a model of 135 million weights: what a tiny one's switch is expected to take is overhead alone."""
    from bench.workload import write_adapters

    base = ensure_demo_model()
    config = EngineConfig(
        str(base), device="cpu", dtype="float32", num_threads=1, num_blocks=256, max_num_seqs=16, policy="credit"
    )
    replica = build_replica(config)
    try:
        engine = replica.engine
        [spec] = [replica.load_adapter(name, path) for name, path in write_adapters(base, tmp_path, 16, 1).items()]
        for index in range(6):
            params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
            prompt = list(range(1000 + index, 1032 + index))
            engine.add_request(Request(f"r{index}", prompt, params, 1, time.perf_counter(), spec))
        while engine.has_work:
            engine.step(time.perf_counter())
        assert engine.num_merged_steps > 10
    finally:
        replica.close()
