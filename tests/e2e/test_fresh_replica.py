"""A replica that was just started merges an adapter that all its requests ask for, by what it expects of its device."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.workload import write_adapters
from demo_model import ensure_demo_model

from peft_dist.core.config import EngineConfig
from peft_dist.runner.replica import build_replica
from tests.runner.test_costs import serve

pytestmark = pytest.mark.slow


def test_smollm2_merges_without_having_merged_before(tmp_path: Path) -> None:
    """Of a model of 135 million weights: what a tiny one's switch is expected to take is overhead alone."""
    base = ensure_demo_model()
    config = EngineConfig(
        str(base), device="cpu", dtype="float32", num_threads=1, num_blocks=256, max_num_seqs=16, policy="credit"
    )
    replica = build_replica(config)
    try:
        [spec] = [replica.load_adapter(name, path) for name, path in write_adapters(base, tmp_path, 16, 1).items()]
        serve(replica, 6, spec, tokens=40)
        assert replica.engine.num_merged_steps > 10
    finally:
        replica.close()
