"""Whole runs: every request ends, figures add up, the same seed gives the same files, profiles say what they must."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.cost_model import CostModel, StepFeatures
from peft_dist.core.errors import ConfigError
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile, names
from peft_dist.workload import arrivals, generator, lengths, records

ROOT = Path(__file__).parents[2]
SMALL = lengths.Filters(max_prompt=200, max_total=260)


def load(rate: float = 6.0, count: int = 40, adapters: int = 6, seed: int = 0) -> arrivals.Workload:
    shares = arrivals.zipf(adapters, 1.0)
    sizes = lengths.synthetic("sharegpt", SMALL, seed)
    return generator.from_shares(
        [f"a{i}" for i in range(adapters)], shares, "Zipf (1)", generator.Load(rate, count, seed=seed), sizes
    )


def run(workload: arrivals.Workload, **options: Any) -> SimulationResult:
    return simulate(workload.arrivals, CostProfile.load("paper-7b"), SimulationOptions(**{"replicas": 2, **options}))


@pytest.mark.parametrize("migration", ["rr", "proactive", "dlora"])
def test_every_request_is_answered_and_counted_once(migration: str) -> None:
    workload = load()
    result = run(workload, migration=migration)
    assert len(result.records) == len(workload.arrivals)
    for record, arrival in zip(result.records, workload.arrivals, strict=True):
        assert record.error is None
        assert (record.scheduled, record.adapter, record.output_tokens) == (
            arrival.time,
            arrival.adapter,
            arrival.output_tokens,
        )
        assert record.first_token is not None and record.queueing is not None
        # A message, its wait, and a step that is 15 ms at least.
        assert record.first_token - record.sent >= record.queueing + 0.015
        assert len(record.itl) == record.output_tokens - 1
        assert sum(record.itl) == pytest.approx(record.finished - record.first_token)
    assert sum(replica.requests for replica in result.replicas) == len(result.records)
    waited = sum(record.queueing or 0.0 for record in result.records)
    assert sum(replica.queueing for replica in result.replicas) == pytest.approx(waited)
    assert result.seconds == pytest.approx(max(record.finished for record in result.records))


def test_a_request_that_waits_for_a_seat_tells_for_how_long() -> None:
    """One seat: the second request's first step begins when the first one's last has ended."""
    both = [arrivals.Arrival(0.0, None, 10, 20), arrivals.Arrival(0.0, None, 10, 5)]
    first, second = run(arrivals.Workload(tuple(both)), replicas=1, max_num_seqs=1).records
    assert first.queueing == pytest.approx(0.0, abs=1e-3)
    assert second.queueing == pytest.approx(first.finished, abs=2e-3)


def test_what_is_written_is_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        workload = load(rate=12.0)
        run_of = run(workload, seed=3).run(workload.source, {"scipy": "1"})
        records.write_json(run_of, tmp_path / f"{name}.json")
        records.write_csv(run_of, tmp_path / f"{name}.csv")
        texts.append([(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("json", "csv")])
    assert texts[0] == texts[1]
    source = json.loads(texts[0][0])["source"]
    assert source["simulated"] is True and source["profile"]["name"] == "paper-7b" and source["options"]["seed"] == 3
    assert source["found"]["seconds"] > 0


def test_an_engine_that_learns_costs_decides_as_one_that_knows_them() -> None:
    """On one replica: between two, dispatch breaks ties, which roundings make and unmake."""
    workload = load(rate=10.0)
    known, learnt = (run(workload, learns=learns, replicas=1).records for learns in (False, True))
    for one, other in zip(known, learnt, strict=True):
        assert other.finished == pytest.approx(one.finished, abs=1e-6)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("policy", ["credit", "merge", "fcfs"])
def test_steps_at_once_leave_nothing_different(policy: str, depth: int) -> None:
    """Records with the time of every token, each replica's part, and what moved."""
    workload = load(rate=14.0, count=60)
    at_once, singly = (run(workload, advance=advance, policy=policy, depth=depth) for advance in (True, False))
    assert at_once.records == singly.records
    assert at_once.replicas == singly.replicas and at_once.migration == singly.migration
    assert at_once.events < singly.events or depth


def test_without_merging_all_steps_are_unmerged() -> None:
    result = run(load(), merge="off", policy="fcfs")
    assert all(not replica.merged_steps and not replica.switches for replica in result.replicas)


def test_kv_that_may_not_move_is_computed_again() -> None:
    """Half of the requests are long, so that in the end one replica has seats free that others wait for."""
    burst = [arrivals.Arrival(0.01 * i, "a0" if i < 15 else "a1", 100, 200 if i % 2 else 10) for i in range(30)]
    moved, again = (
        run(arrivals.Workload(tuple(burst)), moves_kv=moves_kv, max_num_seqs=4).migration for moves_kv in (True, False)
    )
    assert moved.moves.get("kv", 0) > 0 and moved.kv_bytes > 0
    assert set(again.moves) == {"recompute"} and not again.kv_bytes


def test_a_request_that_moved_waited_once() -> None:
    """Its wait where it came from was counted a second time with that where its first step was."""
    burst = [arrivals.Arrival(0.01 * i, "a0" if i < 15 else "a1", 100, 200 if i % 2 else 10) for i in range(30)]
    result = run(arrivals.Workload(tuple(burst)), moves_kv=False, max_num_seqs=4)
    assert result.migration.moves["recompute"] > 0
    for record in result.records:
        assert record.first_token is not None and record.queueing is not None
        assert record.first_token - record.sent >= record.queueing + 0.015, record.index


def test_an_unknown_execution_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"exec_type='slora' is unknown.*dlora"):
        run(load(), exec_type="slora")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicas": 0}, "replicas=0"),
        ({"migration": "none"}, "migration='none' is unknown"),
        ({"plan": "cbc"}, "plan='cbc' is unknown"),
        ({"rank": 0}, "rank 0"),
        ({"plan_seconds": -1.0}, "plan_seconds=-1.0"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SimulationOptions(**options)


def test_the_paper_says_what_the_artifact_says() -> None:
    ours, artifact = CostProfile.load("paper-7b").truth(), CostModel.paper()
    for features in (StepFeatures(merged=True), StepFeatures(merged=False, lora_tokens=4, adapters=2)):
        assert ours.step_seconds(features) == artifact.step_seconds(features)
    assert ours.switch_seconds(None, "a", 16) == artifact.switch_seconds(None, "a", 16) == 0.020


def test_profiles_of_the_paper_are_what_the_command_writes(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import paper_profiles
    finally:
        sys.path.pop(0)
    for name, (shape, devices) in paper_profiles.PROFILES.items():
        paper_profiles.profile(name, shape, devices).dump(tmp_path / f"{name}.json")
        assert (tmp_path / f"{name}.json").read_bytes() == (
            ROOT / "peft_dist" / "sim" / "profiles" / f"{name}.json"
        ).read_bytes()
        assert name in names()
    # What the artifact's authors compute for rank 16: bytes of an adapter, and of one device's part at four.
    assert 16 * paper_profiles.profile("", paper_profiles.SMALL, 1).rank_bytes == 100_925_440
    assert 16 * paper_profiles.profile("", paper_profiles.LARGE, 4).rank_bytes / 4 == pytest.approx(196.3 * 2**20, 1e-3)


def test_the_profile_of_a_comparison_with_a_live_device_is_here() -> None:
    """As it was measured, under a name; there its messages took nothing, because it was one engine."""
    result = json.loads((ROOT / "docs" / "results" / "live_vs_sim_h200.json").read_text())
    compared = CostProfile.of(result["figures"]["profile"], "live_vs_sim_h200.json")
    name = "h200-8b-measured"
    assert CostProfile.load(name) == replace(compared, name=name, message_seconds=0.0002) and name in names()


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = CostProfile.load("paper-13b")
    profile.dump(tmp_path / "mine.json")
    assert CostProfile.load(tmp_path / "mine.json") == profile


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("{}", "no profile of format 1"),
        ('{"peft_dist_profile": 1}', "broken"),
        ('{"peft_dist_profile": 1, "costs": {"speed": 1}}', "broken"),
    ],
)
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        CostProfile.load(tmp_path / "x.json")


def test_profiles_that_are_not_there_are_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no profile 'mine'.*paper-7b"):
        CostProfile.load("mine")
