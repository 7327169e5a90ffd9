"""A profile is fitted to lines of GPU benchmarks, and says what is not theirs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import profile_of_lines
import pytest

from peft_dist.core.cost_model import StepFeatures
from peft_dist.sim.fitting import predicted
from peft_dist.sim.profile import CostProfile

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
            "new_tokens": 129,
        })  # fmt: skip
    # Something disturbed this one, and this one is of another rank.
    found.append({**found[0], "step_ms": 900.0, "prefills_ms": [1.0, 2.0]})
    found.append({**found[0], "step_ms": 900.0, "rank": "64"})
    found.append({**USUAL, "mode": "merged", "adapters": "same", "batch": 8, "distinct": 1,
                  "step_ms": 1e3 * seconds(8, 0, 0), "prefill_ms": 1.0, "prefills_ms": [1.0, 1.0]})  # fmt: skip
    found.append({"engine": "ours", "part": "merge", "merge_ms": 23.0, "unmerge_ms": 8.0})
    return found


def made_of(tmp_path: Path, found: list[dict[str, Any]], *more: str) -> CostProfile:
    result, output = tmp_path / "result.json", tmp_path / "made.json"
    environment = {"date": "a day", "gpu": "a card", "torch": "2"}
    result.write_text(json.dumps({"environment": environment, "figures": {"measurements": found}}))
    profile_of_lines.main([str(result), "--like", "h200-8b", "--output", str(output), *more])
    return CostProfile.load(output)


def test_terms_are_found_again(tmp_path: Path) -> None:
    made, like = made_of(tmp_path, lines(), "--shape", "70b"), CostProfile.load("h200-8b")
    for decodes, prompts, adapters in [(1, 0, 0), (64, 0, 32), (16, 0, 1), (0, 1000, 4)]:
        features = StepFeatures(False, decodes, prompts, (decodes + prompts) * bool(adapters), adapters, 16 * adapters)
        weights = {name: value for name, value in asdict(made.costs).items() if isinstance(value, float)}
        assert predicted(weights, features) == pytest.approx(seconds(decodes, prompts, adapters), rel=0.02)
    assert (
        made.costs.merge == (0.023, 0.0) and made.costs.unmerge == (0.008, 0.0) and made.costs.load == like.costs.load
    )
    assert made.tensor_parallel_size == 4 and made.hardware == "4 × a card" and made.versions == {"torch": "2"}
    # A token's KV, and an adapter's row, of 80 layers.
    assert made.block_bytes == 16 * 2 * 80 * 2 * 8 * 128 and made.rank_bytes == 2 * 80 * 161_792
    assert "made by scripts/profile_of_lines.py of result.json" in made.source and like.source in made.source
    assert made.prompt_sizes[:2] == (64, 128) and made.prompt_sizes[-1] == like.max_num_batched_tokens


def test_lines_that_are_known_to_be_wrong_are_left_out_by_name(tmp_path: Path) -> None:
    wrong = {**USUAL, "mode": "merged", "adapters": "same", "batch": 128, "distinct": 1,
             "step_ms": 1.5e3 * seconds(128, 0, 0), "prefill_ms": 1.0, "prefills_ms": [1.0, 1.0]}  # fmt: skip
    with_it = made_of(tmp_path, [*lines(), wrong])
    without = made_of(tmp_path, [*lines(), wrong], "--leave-out", "merged:128")
    assert with_it.costs.merged_token > 1e-5 and without.costs.merged_token < 1e-6
    assert "Left out: merged:128." in without.source
    with pytest.raises(SystemExit, match="there are no steps merged:127 to leave out"):
        made_of(tmp_path, lines(), "--leave-out", "merged:127")


def test_merged_steps_that_were_not_measured_are_the_bases(tmp_path: Path) -> None:
    made = made_of(tmp_path, [line for line in lines() if line.get("mode") != "merged"])
    assert made.costs.merged_step == made.costs.merged_token == 0.0
    assert "Merged steps were not measured" in made.source


def test_moves_and_context_are_added_and_told(tmp_path: Path) -> None:
    gaps = {"100": 90.0, "1000": 30.0, "4000": 34.0}
    gap = {tokens: {"kv": {"p50_ms": ms, "beside": {"p50_ms": 6.0}}} for tokens, ms in gaps.items()}
    moves = tmp_path / "migration.json"
    moves.write_text(json.dumps({"environment": {"date": "another day"}, "figures": {"added_gap": gap}}))
    found = [line for line in lines() if line.get("mode") != "merged"]
    plain = made_of(tmp_path, found)
    more = made_of(tmp_path, found, "--moves", str(moves), "--kv-bandwidth", "1e12")
    assert more.costs.transfer == (pytest.approx(0.026), 0.0)
    # On each of four ranks a quarter of a token's bytes; lines are of 128 + 129 / 2 tokens.
    assert more.context_token == pytest.approx(plain.block_bytes / plain.block_size / 4 / 1e12)
    assert more.context == 192.5 and plain.context == plain.context_token == 0.0
    assert "of migration.json, measured on another day" in more.source and "was not measured" in more.source
