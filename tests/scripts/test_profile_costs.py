"""A profile is measured on a small model and simulated with; live and simulated are put beside each other."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import profile_costs
import pytest
from bench.cost_runs import Measured
from experiments import live_vs_sim

from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import StepFeatures
from peft_dist.sim.experiment import simulate
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival
from peft_dist.workload.records import RequestRecord

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ["--shape", "tiny", "--set", "num_blocks=512", 'dtype="float32"', "max_model_len=512", 'device="cpu"']


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_small_model_is_measured_and_simulated(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    sizes = ["--adapters", "4", "--sizes", "1", "2", "8", "--distinct", "0", "1", "4", "--tokens", "6", "--rounds", "2"]
    steps = tmp_path / "steps.json"
    more = ["--prompts", "32", "128", "--switches", "3", "--steps", str(steps), "--contexts", "32", "400"]
    run("profile_costs.py", *TINY, *sizes, *more, "--output", str(file))
    profile = CostProfile.load(file)
    costs = profile.costs
    assert profile.name == "mine" and profile.max_num_seqs == 8 and profile.num_blocks == 512
    assert profile.modules == 14 and "8 sequences" in profile.source
    # Two layers of width 64: a step takes some ms, as tokens of prompts, merging, loads and copies take something.
    assert 1e-4 < costs.step + costs.decode_sequence < 1.0
    assert costs.prefill_token > 0 and costs.merge[0] > 0 and costs.load[1] > 0 and costs.transfer[1] > 0
    # Of so small a model what a token of context takes may be lost in noise.
    assert 0 <= profile.context_token < 1e-4 and profile.context == 128 + 6 / 2 - 1
    assert profile.num_held == 1 and profile.host_seconds > 0
    assert profile.weight_bytes > 2 * profile.num_held * 4 * 64 * 64
    assert all(kind in profile.source for kind in ("base decode", "unmerged prompts", "merged decode"))
    told = json.loads(steps.read_text())
    assert {row["measured"] % 2 for row in told} == {0}, "each batch was run twice"
    assert {row["adapters"] for row in told} == {0, 1, 2, 4} and all(row["fitted"] > 0 < row["seconds"] for row in told)
    [record] = simulate([Arrival(0.0, "a", 32, 5)], profile).records
    assert record.error is None and 5 * costs.step < record.e2e < 5.0


@pytest.mark.parametrize("in_flight", [True, False])
def test_what_a_token_of_context_takes_is_the_slope(in_flight: bool) -> None:
    usual = [(tokens, 5e-3 + 2e-8 * tokens, None) for tokens in (4000, 4032, 32000, 32032)]
    measured = Measured(contexts=[*usual, (4000, 1.0, 5e-3 + 2e-8 * 4000), (4000, 5e-3 + 2e-8 * 4000, 1.0)])
    measured.contexts += [(tokens, seconds, seconds) for tokens, seconds, _ in usual]
    assert profile_costs.context_token(measured, in_flight=in_flight) == pytest.approx(2e-8)
    assert profile_costs.context_token(Measured(contexts=usual[:1]), in_flight=in_flight) == 0.0


@pytest.mark.slow
def test_live_and_simulated_are_put_beside_each_other(tmp_path: Path) -> None:
    """How near they are depends on what else the machine does: docs/results has what was measured on a quiet one."""
    run("experiments/live_vs_sim.py", *TINY, "--engine", "--adapters", "4", "--seconds", "2", "--loads", "0.2", "0.9:2",
        "--seeds", "0", "1", "--output", str(tmp_path))  # fmt: skip
    figures = json.loads((tmp_path / "live_vs_sim.json").read_text())["figures"]
    assert [(one["load"], one["zipf"]) for one in figures["rates"]] == [(0.2, 1.0), (0.9, 2.0)]
    assert figures["settings"]["loads"] == "['0.2', '0.9:2']" and figures["settings"]["seeds"] == "[0, 1]"
    for one in figures["rates"]:
        for run_ in one["runs"]:
            assert run_["live"]["failed"] == run_["simulated"]["failed"] == 0
            assert run_["live"]["requests"] == run_["simulated"]["requests"] == run_["requests"]
            assert 0 <= run_["live_merged_share"] <= 1
        ratios = [
            run_["simulated"]["normalized_latency"]["mean"] / run_["live"]["normalized_latency"]["mean"]
            for run_ in one["runs"]
        ]
        told = one["simulated_over_live"]["normalized_latency"]["mean"]
        assert [told["least"], told["most"]] == pytest.approx(sorted(ratios))
        assert told["mean"] == pytest.approx(sum(ratios) / 2)
    # From what the result says of itself come the same arrivals, and the same virtual seconds.
    run("experiments/simulate_again.py", str(tmp_path / "live_vs_sim.json"))
    again = json.loads((tmp_path / "live_vs_sim.json").read_text())["figures"]["again"]
    for one, other in zip(again["rates"], figures["rates"], strict=True):
        for of_one, of_other in zip(one["runs"], other["runs"], strict=True):
            for figure, expected in of_other["simulated_over_live"].items():
                assert of_one["simulated_over_live"][figure] == pytest.approx(expected)


def test_the_tail_of_a_burst_is_not_its_pace() -> None:
    """100 requests end at 10 a second, and one much later."""
    ends = [0.1 * index for index in range(100)] + [500.0]
    records = [RequestRecord(i, None, 0.0, 0.0, 0.0, end, 1, 1) for i, end in enumerate(ends)]
    assert live_vs_sim.pace(records) == pytest.approx(10.0)


def test_what_is_measured_is_what_is_served(tmp_path: Path) -> None:
    config = EngineConfig(
        "base", device="cpu", dtype="float32", load_format="dummy", num_threads=1, max_model_len=512, fuse=False,
        merged_minority=True, num_blocks=64,
    )  # fmt: skip
    told = "--dtype float32 --load-format dummy --device cpu --max-model-len 512 --num-blocks 64 --threads 1"
    found = live_vs_sim.serve_options(config)
    assert sorted(found) == sorted([*told.split(), "--no-fuse", "--merged-minority"])
    with pytest.raises(SystemExit, match="--set kv_cache_bytes: peft-dist serve has no option"):
        live_vs_sim.serve_options(replace(config, kv_cache_bytes=1))


def test_results_hold_no_path(tmp_path: Path) -> None:
    options = argparse.Namespace(
        profile=tmp_path / "mine.json", output=tmp_path, loads=[live_vs_sim.Load(0.3)], seeds=[0]
    )
    assert live_vs_sim.settings(options) == {"profile": "mine.json", "loads": "['0.3']", "seeds": "[0]"}


def test_only_a_device_that_captures_steps_has_sizes_of_them() -> None:
    config = EngineConfig("base", max_num_seqs=4, max_num_batched_tokens=128)

    def sizes(device: str, **more: Any) -> dict[str, tuple[int, ...]]:
        info = ModelInfo("base", "base", 512, 100, (2,), 64, 0, 16, device, "float32", 1, "triton", "triton")
        return profile_costs.sizes_of(info, replace(config, **more))

    assert sizes("cuda:0") == {"decode_sizes": (1, 2, 3, 4), "prompt_sizes": (64, 128)}
    nothing = {"decode_sizes": (), "prompt_sizes": ()}
    assert sizes("cpu") == sizes("cuda:0", enforce_eager=True) == nothing


def test_a_fit_is_of_what_a_captured_step_computes() -> None:
    """A step of 5 decodes runs in one of 8, and one of 9 in itself."""
    seconds = {1: 1.1, 5: 1.8, 9: 1.9}
    steps = [(StepFeatures(False, rows), seconds[rows], None) for rows in seconds]
    costs, errors = profile_costs.fitted(Measured(steps=steps), in_flight=False, prompt_sizes=(), decode_sizes=(1, 8))
    assert (costs.step, costs.decode_sequence) == pytest.approx((1.0, 0.1), rel=1e-3)
    assert max(errors.values()) < 1e-3
