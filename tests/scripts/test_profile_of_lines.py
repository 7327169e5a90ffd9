"""A profile is fitted to lines of GPU benchmarks, and says what is not theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.cost_model import StepFeatures
from peft_dist.sim.fitting import predicted
from peft_dist.sim.profile import CostProfile

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "profile_of_lines.py"
COSTS = {"step": 4e-3, "decode_sequence": 2e-5, "prefill_token": 1e-5, "lora_step": 3e-4, "adapter": 1e-5}
USUAL = {"engine": "ours", "part": "decode", "rank": "16", "shape": "70b", "tensor_parallel_size": 4}


def seconds(decodes: int, prompts: int, adapters: int) -> float:
    weights = dict.fromkeys(("merged_step", "merged_token", "lora_token", "rank_row", "rank_row_token"), 0.0) | COSTS
    tokens = decodes + prompts if adapters else 0
    return predicted(weights, StepFeatures(False, decodes, prompts, tokens, adapters, 16 * adapters, 16 * tokens))


def lines() -> list[dict[str, Any]]:
    found = []
    for kind, batch, distinct in [
        (k, b, d) for b in (1, 8, 32, 128) for k, d in (("none", 0), ("distinct", min(b, 32)))
    ]:
        prefill = 1e3 * seconds(0, 128 * batch, distinct)
        found.append({
            **USUAL, "mode": "lora", "adapters": kind, "batch": batch, "distinct": distinct,
            "step_ms": 1e3 * seconds(batch, 0, distinct), "prefill_ms": prefill, "prefills_ms": [prefill] * 2,
        })  # fmt: skip
    # Something disturbed this one, and this one is of another rank.
    found.append({**found[0], "step_ms": 900.0, "prefills_ms": [1.0, 2.0]})
    found.append({**found[0], "step_ms": 900.0, "rank": "64"})
    found.append({**USUAL, "mode": "merged", "adapters": "same", "batch": 8, "distinct": 1,
                  "step_ms": 1e3 * seconds(8, 0, 0), "prefill_ms": 1.0, "prefills_ms": [1.0, 1.0]})  # fmt: skip
    found.append({"engine": "ours", "part": "merge", "merge_ms": 23.0, "unmerge_ms": 8.0})
    return found


def test_terms_are_found_again(tmp_path: Path) -> None:
    result, output = tmp_path / "result.json", tmp_path / "made.json"
    environment = {"date": "a day", "gpu": "a card", "torch": "2"}
    result.write_text(json.dumps({"environment": environment, "figures": {"measurements": lines()}}))
    command = [sys.executable, str(SCRIPT), str(result), "--like", "h200-8b", "--shape", "70b", "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    made, like = CostProfile.load(output), CostProfile.load("h200-8b")
    for decodes, prompts, adapters in [(1, 0, 0), (64, 0, 32), (16, 0, 1), (0, 1000, 4)]:
        features = StepFeatures(False, decodes, prompts, (decodes + prompts) * bool(adapters), adapters, 16 * adapters)
        weights = {
            name: getattr(made.costs, name) for name in dir(made.costs) if isinstance(getattr(made.costs, name), float)
        }
        assert predicted(weights, features) == pytest.approx(seconds(decodes, prompts, adapters), rel=0.02)
    assert (
        made.costs.merge == (0.023, 0.0) and made.costs.unmerge == (0.008, 0.0) and made.costs.load == like.costs.load
    )
    assert made.tensor_parallel_size == 4 and made.hardware == "4 × a card" and made.versions == {"torch": "2"}
    # A token's KV, and an adapter's row, of 80 layers.
    assert made.block_bytes == 16 * 2 * 80 * 2 * 8 * 128 and made.rank_bytes == 2 * 80 * 161_792
    assert "made by scripts/profile_of_lines.py of result.json" in made.source and like.source in made.source
