"""Dispatch, placement and moves are decided again from an orchestrator's recording, and otherwise on other input."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import pytest

from peft_dist.core.errors import ConfigError
from peft_dist.core.messages import Progress
from peft_dist.core.record_file import End
from peft_dist.orchestrator import recording as rec
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.recorded import RecordedOrchestrator, make_orchestrator
from peft_dist.placement.triggers import TriggerSettings
from peft_dist.sim.hardware import dlora
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.orchestrator_replay import replay
from peft_dist.sim.profile import CostProfile
from peft_dist.sim.replay import ReplayError
from peft_dist.sim.simulator import SimCluster, Simulator
from peft_dist.workload.arrivals import Arrival

PROFILE = CostProfile.load("paper-7b")
NAMES = [f"a{index}" for index in range(6)]


@cache
def recorded(migration: str = "dlora", replicas: int = 3) -> tuple[rec.Entry, ...]:
    """A cluster in virtual time whose steps take what the profile says, with more than it can take for a while."""
    rng = random.Random(5)
    asked = [
        Arrival(rng.uniform(0, 6), NAMES[min(int(rng.paretovariate(0.8)) - 1, 5)], rng.randrange(8, 400),
                rng.randrange(2, 150))
        for _ in range(120)
    ]  # fmt: skip
    hardware = [dlora(PROFILE, SimulationOptions(max_num_seqs=6), index) for index in range(replicas)]
    triggers = TriggerSettings(pause=0.2)
    options = OrchestratorOptions(max_num_seqs=6, max_queue=1 << 20, migration=migration, triggers=triggers)  # type: ignore[arg-type]
    specs = {name: PROFILE.adapter(name, 16) for name in NAMES}
    simulator = Simulator(SimCluster(hardware, specs, options), by_messages=True)
    entries: list[rec.Entry] = []
    # As from JSON: what is noted is what was true then.
    simulator.core = RecordedOrchestrator(options, lambda entry: entries.append(again(entry)))
    outcomes = simulator.run(sorted(asked, key=lambda one: one.time))
    assert all(outcome.error is None for outcome in outcomes)
    return tuple(entries)


def again(entry: rec.Entry) -> rec.Entry:
    return msgspec.json.decode(msgspec.json.encode(entry), type=rec.Entry)


@pytest.mark.parametrize("migration", ["rr", "proactive", "dlora"])
def test_the_same_is_decided(migration: str) -> None:
    entries = recorded(migration)
    found = replay(entries)
    assert found.ended is None and found.requests == 120
    assert found.commands["AddRequest"] >= 120
    plans = [entry.plan for entry in entries if isinstance(entry, rec.Plan)]
    assert found.plans == len(plans) and bool(plans) is (migration == "dlora")
    if migration == "dlora":
        assert any(plan.moves for plan in plans)
    assert (found.placements > 0) is (migration != "rr")
    assert found.words.startswith("120 requests, ")


def later(entry: rec.Entry) -> rec.Entry:
    """Replica 0 is said to have drawn each of its tokens much later, and so to be slow."""
    if isinstance(entry, rec.Observe) and entry.replica_id == 0 and isinstance(entry.report, Progress):
        detail = entry.report.detail
        if detail is None or detail.costs is None:
            return entry
        costs = msgspec.structs.replace(detail.costs, step=tuple(9 * value for value in detail.costs.step))
        detail = msgspec.structs.replace(detail, costs=costs)
        return msgspec.structs.replace(entry, report=msgspec.structs.replace(entry.report, detail=detail))
    return entry


def other_placement(entry: rec.Entry) -> rec.Entry:
    if isinstance(entry, rec.Placed) and entry.placement is not None:
        hosts = {name: frozenset({0}) for name in entry.placement.hosts}
        return msgspec.structs.replace(entry, placement=msgspec.structs.replace(entry.placement, hosts=hosts))
    return entry


def other_moves(entry: rec.Entry) -> rec.Entry:
    """What was to move is said to have stayed."""
    return msgspec.structs.replace(entry, moves=[]) if isinstance(entry, rec.Move) else entry


def other_dispatch(entry: rec.Entry) -> rec.Entry:
    """The first request is said to have gone elsewhere."""
    if isinstance(entry, rec.Decided) and any(sent.kind == "AddRequest" for sent in entry.sent):
        sent = [msgspec.structs.replace(one, replica_id=1 - min(one.replica_id, 1)) for one in entry.sent]
        return msgspec.structs.replace(entry, sent=sent)
    return entry


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (later, r"input \d+ \(.*\): (recorded is|a plan would be made for other)"),
        (other_placement, r"\(Placed at .*\): recorded is .*, replayed Placement"),
        (other_moves, r"\(Move at .*\)"),
        (other_dispatch, r"\(Submit at .*\): recorded is .*kind='AddRequest'.*, replayed Sent"),
    ],
)
def test_on_other_input_something_else_is_decided_and_told(
    change: Callable[[rec.Entry], rec.Entry], words: str
) -> None:
    with pytest.raises(ReplayError, match=words):
        replay([change(entry) for entry in recorded()])


def test_what_says_nothing_is_no_recording(tmp_path: Any) -> None:
    begin = rec.Begin(rec.FORMAT, OrchestratorOptions(seed=1))
    for entries in ([], [begin], [begin, End("why")]):
        with pytest.raises(ConfigError, match="ends before anything was decided"):
            replay(entries)
    with pytest.raises(ConfigError, match="format 99"):
        replay([rec.Begin(99, OrchestratorOptions(seed=1))])


def test_a_seed_is_told_and_adoption_ends_the_recording(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[rec.Entry] = []
    core = RecordedOrchestrator(OrchestratorOptions(), entries.append)
    [begin] = entries
    assert isinstance(begin, rec.Begin) and begin.options.seed is not None
    core.add_replica(0, 0.0)
    core.replicas.join(1.0)
    assert replay([again(entry) for entry in entries]).requests == 0
    core.replicas.join(2.0, wanted=7)
    core.tick(3.0)
    assert isinstance(entries[-1], End) and "adopted" in entries[-1].why
    monkeypatch.setenv("PEFT_DIST_RECORD", str(tmp_path))
    assert type(make_orchestrator(OrchestratorOptions(), finds_replicas=True)).__name__ == "Orchestrator"
    assert not list(tmp_path.iterdir())
    assert isinstance(make_orchestrator(OrchestratorOptions()), RecordedOrchestrator)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["orchestrator"]
