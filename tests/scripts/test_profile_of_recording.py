"""A profile of what replicas recorded says what their work took."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import profile_of_recording
import pytest
from bench.recorded_steps import RecordedLoad, recordings, service_seconds

from peft_dist.core.config import EngineConfig
from peft_dist.core.cost_model import STEP_TERMS, CostPrior, StepFeatures
from peft_dist.core.record_file import VARIABLE
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.assembly import assemble
from peft_dist.engine.driver import EngineDriver
from peft_dist.engine.recorded_moves import make_handovers
from peft_dist.engine.recording import Collected, Entry, Submitted
from peft_dist.runner.replica import build_replica
from peft_dist.sim.executor import SimExecutor
from peft_dist.sim.fitting import WithContext
from peft_dist.sim.hardware import dlora
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.sim.replay import read
from tests.tiny_models import make_model, random_adapter, target_modules

LIKE = CostProfile.load("paper-7b")
TRUTH = replace(
    LIKE,
    costs=CostPrior(
        step=5e-3, decode_sequence=2e-4, prefill_token=3e-5, lora_step=1e-3, lora_token=1e-5, adapter=2e-4,
        merge=(4e-3, 0.0), unmerge=(1e-3, 0.0), load=(0.0, 1e-9),
    ),
    context_token=2e-6, context=30.0, loads_at_once=2, depth=1, num_held=1, max_num_seqs=8,
)  # fmt: skip
SPECS = [TRUTH.adapter(f"a{index}", 16) for index in range(6)]


def write(path: Path, entries: list[Entry]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
    return path


def virtual(seed: int, count: int = 120, stalls: float = 0.0, **options: Any) -> list[Entry]:
    """What an engine on a device of these costs records; every 50th call comes ``stalls`` seconds later."""
    rng, now, entries = random.Random(seed), 0.0, []
    hardware = dlora(TRUTH, SimulationOptions(num_blocks=400, **options), 0)
    executor = SimExecutor(
        hardware.truth, lambda: now, hardware.block_bytes, hardware.num_held,
        context_token=TRUTH.context_token, context=TRUTH.context, loads_at_once=TRUTH.loads_at_once,
    )  # fmt: skip
    info = replace(hardware.model(), merge_way="shadow")
    engine = assemble(
        hardware.config, info, executor, hardware.prior(), page_rows=1, num_rows=None, record=entries.append
    )
    driver = EngineDriver(engine, make_handovers(engine), lambda report: None, lambda: now)
    for spec in SPECS:
        engine.register_adapter(spec)

    def call(number: int) -> None:
        nonlocal now
        before = now
        driver.step(report=False)
        ends = executor.next_end()
        waits = ends is not None and (engine.waits_for_load or not engine.has_work)
        now = max(executor.collected_at, before + 1e-4, ends if waits and ends is not None else 0.0)
        now += stalls if number % 50 == 49 else 0.0

    calls = 0
    for number in range(count):
        # The first ones are all for one adapter, so that it is merged.
        adapter = SPECS[0 if number < count // 3 else rng.randrange(len(SPECS))]
        params = SamplingParams(temperature=0.0, max_tokens=rng.randrange(2, 40), ignore_eos=True)
        engine.add_request(Request(f"r{number}", [5] * rng.randrange(4, 120), params, 1, now, adapter))
        for _ in range(rng.randrange(8)):
            call(calls := calls + 1)
    while engine.has_work:
        call(calls := calls + 1)
    return entries


def made_of(tmp_path: Path, *paths: Path, like: str = "paper-7b") -> CostProfile:
    output = tmp_path / "mine.json"
    profile_of_recording.main([*map(str, paths), "--like", like, "--output", str(output)])
    return CostProfile.load(output)


def weights(profile: CostProfile) -> WithContext:
    step = {name: getattr(profile.costs, name) for name in STEP_TERMS}
    return WithContext(step, profile.context_token, profile.context)


@pytest.mark.parametrize("stalls", [0.0, 0.05])
def test_costs_are_found_again(tmp_path: Path, stalls: float) -> None:
    paths = [write(tmp_path / f"engine-{seed}-0.jsonl", virtual(seed, stalls=stalls)) for seed in (1, 2)]
    made = made_of(tmp_path, *paths)
    factor = float(made.source.split("multiplied by ")[1].split(". ")[0])
    # One stall in 50 steps of 8 ms each.
    assert factor == pytest.approx(1.0, abs=0.002) if not stalls else 1.05 < factor < 1.2
    for decodes, prompts, adapters, cached in [(8, 0, 4, 400), (2, 0, 1, 60), (3, 90, 3, 90), (8, 0, 1, 800)]:
        tokens = decodes + prompts
        features = StepFeatures(False, decodes, prompts, tokens, adapters, 16 * adapters, 16 * tokens)
        expected = weights(TRUTH).predicted(features, cached)
        assert weights(made).predicted(features, cached) / factor == pytest.approx(expected, rel=0.03)
    assert made.costs.load[1] == pytest.approx(1e-9, rel=0.2) and made.loads_at_once == 2
    assert made.costs.transfer == LIKE.costs.transfer and "as of paper-7b: moves of KV" in made.source
    assert made.depth == 1 and made.num_held == 1 and made.rank_bytes == SPECS[0].num_bytes // SPECS[0].num_rank_rows


def test_switches_are_those_that_cost(tmp_path: Path) -> None:
    [found] = recordings(read(write(tmp_path / "engine-1-0.jsonl", virtual(3, merge="auto"))))
    merges = [seconds for kind, seconds in found.switches if kind == "merge"]
    assert merges and set(merges) == {4e-3}, "a merge back to the copy that is kept takes nothing, and is none"


def test_only_steps_that_follow_each_other_have_seconds_between(tmp_path: Path) -> None:
    entries = virtual(1, count=40)
    [found] = recordings(read(write(tmp_path / "engine-1-0.jsonl", entries)))
    assert len(found.steps) == sum(isinstance(one, Collected) for one in entries) and len(found.adds) == 40
    told = [one for one in found.steps if one.between is not None and not one.switched]
    assert len(told) > 100
    assert all(one.between == pytest.approx(one.seconds, abs=1e-9) for one in told)
    assert 0 < sum(one.loading for one in found.steps) < len(found.steps)


def test_loads_that_wait_for_their_turn_take_no_longer() -> None:
    loads = [RecordedLoad(10, 0.0, ends, None) for ends in (1.0, 1.0, 2.0, 2.0, 3.0)] + [
        RecordedLoad(10, 5.0, 6.5, None)
    ]
    assert service_seconds(loads, 2) == [(10, 1.0)] * 5 + [(10, 1.5)]
    assert service_seconds(loads, 8)[2] == (10, 2.0)


def test_a_profile_is_held_against_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "engine-1-0.jsonl", virtual(1, stalls=0.05))
    TRUTH.dump(tmp_path / "truth.json")
    profile_of_recording.main([str(path), "--against", str(tmp_path / "truth.json")])
    *rows, last = capsys.readouterr().out.strip().splitlines()
    assert all(row.split(" | ")[3] == "1.00" for row in rows[2:]) and len(rows) > 4
    assert "device" in last and "s else" in last


def test_recordings_that_make_no_profile_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "engine-1-0.jsonl", virtual(1, count=2))
    with pytest.raises(SystemExit, match="let the replicas serve longer"):
        made_of(tmp_path, path)
    other = write(tmp_path / "engine-2-0.jsonl", virtual(1, count=2, depth=0))
    with pytest.raises(SystemExit, match="several kinds of replica"):
        made_of(tmp_path, path, other)
    with pytest.raises(SystemExit):
        profile_of_recording.main([str(path), "--like", "paper-7b"])


def test_a_real_engine_on_a_cpu_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", tmp_path / "base")
    random_adapter(model, tmp_path / "a", 4, 8.0, target_modules("llama"), seed=0)
    folder = tmp_path / "recorded"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    replica = build_replica(
        EngineConfig(str(tmp_path / "base"), device="cpu", max_loras=2, num_blocks=64, max_num_seqs=6, num_threads=1)
    )
    spec = replica.load_adapter("a", tmp_path / "a")
    for number in range(24):
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        adapter = spec if number % 2 else None
        replica.engine.add_request(Request(f"r{number}", [5 + number] * 9, params, 1, time.monotonic(), adapter))
        for _ in range(6):
            replica.engine.step(time.monotonic())
    while replica.engine.has_work:
        replica.engine.step(time.monotonic())
    replica.close()
    [path] = folder.glob("engine-*.jsonl")
    entries = list(read(path))
    made = made_of(tmp_path, path, like="cpu-smollm2")
    assert (made.depth, made.num_blocks, made.max_num_seqs, made.prompt_sizes) == (0, 64, 6, ())
    assert made.rank_bytes == spec.num_bytes // 4 and made.modules == len(spec.ranks)
    # The sum of the seconds is right: whatever the machine did meanwhile is in it.
    [found] = recordings(entries)
    used = [one for one in found.steps if not one.loading and not one.switched]
    expected = sum(weights(made).predicted(one.features, one.num_cached) for one in used)
    assert expected == pytest.approx(sum(one.seconds for one in used), rel=1e-6)
    assert sum(isinstance(one, Submitted) for one in entries) == len(found.steps)
