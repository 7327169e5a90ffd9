"""What a replica believes of its device before anything was measured, and what it keeps for the next start."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig
from peft_dist.core.cost_model import CostModel, CostPrior, StepFeatures
from peft_dist.core.errors import ConfigError
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner import cost_prior
from peft_dist.runner.cost_prior import DeviceSpeed, ModelSize, device_prior, measure_speed
from peft_dist.runner.cost_profile import read_profile, write_profile
from peft_dist.runner.replica import Replica, build_replica
from tests.tiny_models import make_model, random_adapter, target_modules

DECODES = StepFeatures(False, decode_sequences=4)
H100 = DeviceSpeed(bytes_per_second=2.6e12, flops_per_second=5e14, link_bytes_per_second=5e10)
LLAMA_8B = ModelSize(8_000_000_000, 16_000_000_000)
HERE = {"shapes": "abc", "dtype": "float32", "device": "cpu of this kind", "torch": "2.9"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("costs")
    for family in ("llama", "qwen3"):
        model = make_model(family, folder / family)
    random_adapter(model, folder / "adapter", 4, 8.0, target_modules("qwen3"), seed=1)
    return folder


@contextmanager
def replica(root: Path, family: str = "qwen3", **options: Any) -> Iterator[Replica]:
    config = EngineConfig(str(root / family), **({"device": "cpu", "num_blocks": 64, "num_threads": 1} | options))
    made = build_replica(config)
    try:
        yield made
    finally:
        made.close()


def serve(made: Replica, count: int = 3, spec: Any = None, tokens: int = 8) -> None:
    for i in range(count):
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        made.engine.add_request(Request(f"r{i}", [5 + i, 6, 7], params, 1, float(i), spec))
    now = 10.0
    while made.engine.has_work:
        made.engine.step(now)
        now += 1.0


def test_the_prior_is_that_of_the_device() -> None:
    large = device_prior(H100, LLAMA_8B, row_bytes=5_000_000, num_modules=224, merge_way="shadow")
    assert large.step == pytest.approx(7e-3, rel=0.1) and large.merge[0] == pytest.approx(13e-3, rel=0.1)
    assert large.prefill_token == pytest.approx(3e-5, rel=0.1) and large.unmerge == (0.0, 0.0)
    in_place = device_prior(H100, LLAMA_8B, 5_000_000, 224, "host")
    assert in_place.unmerge[0] == pytest.approx(0.32, rel=0.05) and in_place.merge == large.merge
    models = device_prior(H100, LLAMA_8B, 5_000_000, 224, "models")
    assert models.merge == (in_place.unmerge[0], 0.0) and models.unmerge == (0.0, 0.0)
    slower = DeviceSpeed(2.6e10, 1e11, 1.3e10)
    assert CostModel(device_prior(slower, LLAMA_8B, 5_000_000, 224, "shadow")).step_seconds(DECODES) > 0.9


def test_an_adapter_is_expected_to_cost_its_bytes_once_and_its_merge_its_rank_once() -> None:
    """Rank rows are counted in each module: an adapter of rank 16 in 224 modules has 3,584 of them, and an H100 merges
    it in 11.5 ms and adds some 30 µs to a step for it. A server that expects a hundred times that never merges one."""
    rank, modules, row_bytes = 16, 224, 10_354_688
    spec = AdapterSpec("a", "h", "", dict.fromkeys(map(str, range(modules)), rank), rank * row_bytes)
    cost = CostModel(device_prior(H100, LLAMA_8B, row_bytes, modules, "shadow"))
    assert cost.switch_seconds(None, "h", spec.num_rank_rows) == pytest.approx(13.8e-3, rel=0.05)
    one, two = (StepFeatures.of([("h", 1, spec.num_rank_rows), (other, 1, spec.num_rank_rows)]) for other in "hi")
    assert cost.step_seconds(two) - cost.step_seconds(one) == pytest.approx(spec.num_bytes / 2.6e12, rel=0.01)


def test_what_interrupts_one_measurement_is_not_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a replica that loads its model every second one may take a hundred times as long."""
    ticks, clock = itertools.count(), [0.0]

    def told() -> float:
        number = next(ticks)
        # Each measurement asks twice.
        clock[0] += 0.001 * (100.0 if number % 4 == 3 else 1.0)
        return clock[0]

    monkeypatch.setattr(cost_prior.time, "perf_counter", told)
    speed = measure_speed(torch.device("cpu"), torch.float32)
    assert speed.bytes_per_second == pytest.approx(2 * (32 << 20) / 0.001)
    assert speed.flops_per_second == pytest.approx(2 * 64 * 512 * 512 / 0.001)


def test_a_replica_measures_its_device_and_starts_from_that(root: Path) -> None:
    speed = measure_speed(torch.device("cpu"), torch.float32)
    assert 1e8 < speed.bytes_per_second < 1e13 and 1e8 < speed.flops_per_second < 1e15
    with replica(root) as made:
        prior = made.engine.cost.prior
        # 100 KB of weights: a step is the host's work, not the 5 ms of a large model on a large GPU.
        assert prior.step < CostPrior().step / 2 and prior.merge[0] < CostPrior().merge[0] / 2


def test_the_next_start_goes_on_from_what_the_last_one_measured(root: Path, tmp_path: Path) -> None:
    profile = tmp_path / "costs.json"
    with replica(root, cost_profile=str(profile)) as made:
        serve(made)
        assert not profile.exists(), "written at the end, not before"
        learnt = made.engine.cost
    assert profile.exists() and list(tmp_path.iterdir()) == [profile]
    with replica(root, cost_profile=str(profile)) as again:
        assert again.engine.cost.to_dict() == learnt.to_dict() and again.engine.cost.num_steps == 8
        before = profile.read_bytes()
        serve(again)
    assert profile.read_bytes() != before


def test_a_replica_that_ran_nothing_writes_nothing(root: Path, tmp_path: Path) -> None:
    with replica(root, cost_profile=str(tmp_path / "costs.json")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_models_profile_is_not_used_and_replaced(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = tmp_path / "costs.json"
    with replica(root, "llama", cost_profile=str(profile)) as made:
        serve(made)
    theirs = json.loads(profile.read_text())
    with caplog.at_level(logging.WARNING), replica(root, cost_profile=str(profile)) as other:
        assert other.engine.cost.num_steps == 0
        assert "measured elsewhere" in caplog.text and "shapes" in caplog.text
        serve(other)
    ours = json.loads(profile.read_text())
    assert ours["identity"]["shapes"] != theirs["identity"]["shapes"] and ours["model"].endswith("qwen3")


@pytest.mark.parametrize("key", sorted(HERE))
def test_whatever_seconds_depend_on_must_be_the_same(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cost = CostModel()
    cost.observe_step(DECODES, 0.5)
    write_profile(tmp_path / "p.json", HERE, "m", cost)
    assert read_profile(tmp_path / "missing.json", HERE) is None
    found = read_profile(tmp_path / "p.json", HERE)
    assert found is not None and found.to_dict() == cost.to_dict() and not caplog.records
    assert read_profile(tmp_path / "p.json", {**HERE, key: "another"}) is None
    assert key in caplog.text and "'another'" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"no json",
        b"[]",
        b'{"identity": {}}',
        b'{"kind": "peft_dist cost profile"}',
        b'{"kind": "peft_dist cost profile", "identity": {}, "cost": {"format": 99}}',
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_something_else_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cost_profile"):
        read_profile(path, {})
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        read_profile(tmp_path / "nowhere" / "p.json", HERE)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path, HERE)


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.json").mkdir()
    write_profile(tmp_path / "p.json", HERE, "m", CostModel())
    assert "was not written" in caplog.text and [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_loads_and_swaps_are_learnt_from_what_they_took(root: Path) -> None:
    seen: dict[str, list[tuple[int, float]]] = {"load": [], "swap": []}

    class Noting(CostModel):
        def observe_load(self, num_bytes: int, seconds: float) -> None:
            seen["load"].append((num_bytes, seconds))

        def observe_swap(self, num_bytes: int, seconds: float) -> None:
            seen["swap"].append((num_bytes, seconds))

    # Three sequences that end with 5 blocks each, in 8 blocks.
    options = {"num_blocks": 8, "num_host_blocks": 16, "block_size": 8, "max_model_len": 64, "preemption": "swap"}
    with replica(root, **options) as made:
        spec = made.load_adapter("a", root / "adapter")
        made.engine.cost = Noting()
        serve(made, spec=spec, tokens=32)
        assert made.engine.scheduler.num_preemptions
        assert [num_bytes for num_bytes, _ in seen["load"]] == [spec.num_bytes]
        per_block = made.runner.kv.bytes_per_block
    assert seen["swap"] and all(num_bytes and num_bytes % per_block == 0 for num_bytes, _ in seen["swap"])
    assert all(0 < seconds < 60 for kind in seen.values() for _, seconds in kind)


def test_the_option_is_a_file_name() -> None:
    assert EngineConfig("m", cost_profile="p.json").cost_profile == "p.json"
    with pytest.raises(ConfigError, match="cost_profile"):
        replace(EngineConfig("m"), cost_profile=3)  # type: ignore[arg-type]
