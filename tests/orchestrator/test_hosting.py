"""Where adapters are placed, where their requests go by that, and what is sent ahead of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import ConfigError
from peft_dist.core.messages import AdapterResult, LoadAdapter, PrefetchAdapter, ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import PlacementDue
from peft_dist.orchestrator.hosting import LOOK_SECONDS
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.records import Outgoing
from peft_dist.placement.placing import Placement
from tests.orchestrator.test_core import progress
from tests.orchestrator.test_lifecycle import cluster, ready


def answer(core: Orchestrator, commands: list[Outgoing], now: float = 0.0) -> list[Outgoing]:
    """Every load that was sent succeeds."""
    out: list[Outgoing] = []
    for sent in commands:
        if isinstance(load := sent.command, LoadAdapter):
            spec = AdapterSpec(load.name, f"h-{load.path}", load.path, {"q": 4}, 1000)
            out += core.observe(sent.replica_id, sent.epoch, AdapterResult(call_id=load.call_id, spec=spec), now)
    return out


def with_adapters(number: int, **options: object) -> Orchestrator:
    core = cluster(**options)
    for k in range(number):
        answer(core, core.load_adapter(f"a{k}", f"a{k}")[1])
    core.drain_events()
    return core


def place(core: Orchestrator, now: float) -> list[Outgoing]:
    """A tick, and the search that it asks for."""
    out = core.tick(now)
    for event in core.drain_events():
        if isinstance(event, PlacementDue):
            out += core.migration.placed(event.search, event.search.run(), now)
    return out


def submit(core: Orchestrator, name: str, model: str | None, now: float = 0.0) -> int:
    """Returns the replica that got it."""
    new = NewRequest(name, [5], SamplingParams(max_tokens=4), model)
    [replica_id] = {out.replica_id for out in core.submit(new, now)}
    return replica_id


def hosts(core: Orchestrator, name: str) -> frozenset[int]:
    assert core.migration.hosting.placement is not None
    return core.migration.hosting.placement.hosts[f"h-{name}"]


def ahead(commands: list[Outgoing]) -> list[tuple[int, str]]:
    """Replicas and contents of what is sent ahead."""
    assert all(isinstance(out.command, PrefetchAdapter) for out in commands)
    return [(out.replica_id, out.command.content_hash) for out in commands]  # type: ignore[union-attr]


def test_in_turn_requests_go_to_their_hosts_alone() -> None:
    core = with_adapters(4, migration="rr")
    sent = [submit(core, f"r{i}", "a0") for i in range(6)]
    assert sum(len(hosts(core, f"a{k}")) for k in range(4)) == 2 + 4 - 1
    alone = next(f"a{k}" for k in range(4) if len(hosts(core, f"a{k}")) == 1)
    assert set(sent) <= hosts(core, "a0")
    assert {submit(core, f"s{i}", alone) for i in range(6)} == hosts(core, alone)
    # A name that comes later has its place before its first request.
    answer(core, core.load_adapter("late", "late")[1])
    [late] = hosts_after(core, "late")
    assert {submit(core, f"t{i}", "late") for i in range(2)} == {late}
    assert all(not isinstance(event, PlacementDue) for event in core.drain_events())


def hosts_after(core: Orchestrator, name: str) -> frozenset[int]:
    core.tick(0.0)
    return hosts(core, name)


def test_in_turn_a_host_that_is_away_is_stood_in_for_and_gets_its_requests_back() -> None:
    core = with_adapters(4, migration="rr")
    core.tick(0.0)
    alone = next(f"a{k}" for k in range(4) if hosts(core, f"a{k}") == {0})
    assert submit(core, "r", alone) == 0
    core.lose_replica(0, 1, "it died", 1.0)
    assert core._requests.on_replica(1)[0].request_id == "r" and submit(core, "s", alone, 1.0) == 1
    core.tick(2.0)
    answer(core, ready(core, 0, 3, 2.0), 2.0)  # type: ignore[arg-type]
    assert hosts(core, alone) == {0} and submit(core, "t", alone, 3.0) == 0


@pytest.mark.parametrize("kind", ["proactive", "dlora"])
def test_placed_adapters_are_sent_ahead_once(kind: str) -> None:
    core = with_adapters(3, migration=kind)
    placed = {(i, f"h-a{k}") for out in [place(core, 0.0)] for i, content in ahead(out) for k in [content[-1]]}
    assert placed == {(i, f"h-a{k}") for k in range(3) for i in hosts(core, f"a{k}")} != set()
    for replica_id in (0, 1):
        there = [content for i, content in placed if i == replica_id]
        core.observe(replica_id, replica_id + 1, progress_with(ReplicaStats(resident_adapters=there)), 1.0)
    assert place(core, 20.0) == []
    # What a replica has is not sent; one that starts again gets its part when it knows the adapters.
    core.lose_replica(1, 2, "it died", 21.0)
    core.tick(22.0)
    loads = ready(core, 1, 3, 22.0)
    assert ahead(place(core, 23.0)) == [] and not core.migration.hosting.can_run(core.replicas[1], "h-a0")
    answer(core, loads, 23.0)  # type: ignore[arg-type]
    again = place(core, 24.0)
    assert {i for i, _ in ahead(again)} == {1}


def test_what_is_on_the_device_is_not_sent_ahead() -> None:
    core = with_adapters(2)
    stats = ReplicaStats(resident_adapters=["h-a0", "h-a1"])
    for replica_id in (0, 1):
        core.observe(replica_id, replica_id + 1, progress_with(stats), 0.0)
    assert place(core, 0.0) == [] and hosts(core, "a0")
    quiet = with_adapters(2, sends_ahead=False)
    assert place(quiet, 0.0) == [] and hosts(quiet, "a0")


def crowded(core: Orchestrator) -> list[Outgoing]:
    """a0 is placed on replica 0, whose only slot a1 has, of which a request runs. Returns what is sent ahead."""
    for replica in core.replicas.ready():
        assert replica.model is not None
        replica.model = replace(replica.model, max_loras=1)
        there = ReplicaStats(resident_adapters=["h-a1"])
        core.observe(replica.replica_id, replica.epoch, progress_with(there), 0.0)
    submit(core, "other", None)
    assert submit(core, "r", "a1") == 0 or submit(core, "s", "a1") == 0
    core.tick(0.0)
    due = next(event for event in core.drain_events() if isinstance(event, PlacementDue))
    placement = Placement({"h-a0": frozenset({0}), "h-a1": frozenset({1})}, 1.0)
    return core.migration.placed(due.search, placement, 0.0)


def end_all(core: Orchestrator, now: float) -> None:
    for name in ("r", "s", "other"):
        core.abort(name, now)


def sent_in(core: Orchestrator, first: int, last: int) -> list[int]:
    """Seconds at which a0, and nothing else, is sent ahead to replica 0. Another placement is not waited for."""
    found = [(second, one) for second in range(first, last) for one in ahead(core.tick(float(second)))]
    assert {one for _, one in found} <= {(0, "h-a0")}
    return [second for second, _ in found]


def test_what_has_no_room_is_sent_ahead_once_there_is_some() -> None:
    core = with_adapters(2)
    assert crowded(core) == [] and sent_in(core, 1, 20) == []
    end_all(core, 20.0)
    [second] = sent_in(core, 20, 25)
    assert second <= 20 + LOOK_SECONDS


def test_what_found_no_room_is_asked_for_again_ever_later_until_it_is_there() -> None:
    core = with_adapters(2)
    crowded(core)
    end_all(core, 1.0)
    # It drops the wish while a request of its own waits for a load, and reports each time that it has not come.
    first, *others = sent_in(core, 1, 160)
    assert [second - first for second in others] == [5, 15, 35, 75, 155][: len(others)] and len(others) >= 4
    core.observe(0, 1, progress_with(ReplicaStats(resident_adapters=["h-a0"])), 160.0)
    assert sent_in(core, 160, 1000) == []
    # What requests of others put out later comes back with its own.
    core.observe(0, 1, progress_with(ReplicaStats(resident_adapters=["h-a1"])), 1000.0)
    assert sent_in(core, 1000, 2000) == []


def progress_with(stats: ReplicaStats) -> object:
    return progress().__class__(sequences=[], stats=stats)


def test_requests_prefer_hosts_and_go_elsewhere_under_load() -> None:
    core = with_adapters(2)
    placement = Placement({"h-a0": frozenset({1}), "h-a1": frozenset({0})}, 1.0)
    core.tick(0.0)
    [due] = core.drain_events()
    assert isinstance(due, PlacementDue)
    core.migration.placed(due.search, placement, 0.0)
    assert [submit(core, f"r{k}", f"a{k}") for k in range(2)] == [1, 0]
    assert {submit(core, f"s{i}", "a0") for i in range(20)} == {0, 1}


def test_a_search_that_failed_is_made_again_later() -> None:
    core = with_adapters(1)
    core.tick(0.0)
    [due] = core.drain_events()
    assert isinstance(due, PlacementDue)
    core.tick(1.0)
    assert core.drain_events() == [], "one at a time"
    assert core.migration.placed(due.search, None, 2.0) == [] and core.migration.hosting.placement is None
    core.tick(LOOK_SECONDS + 1)
    assert [type(event) for event in core.drain_events()] == [PlacementDue]


def test_an_adapter_or_a_replica_that_comes_is_seen_at_once() -> None:
    core = with_adapters(2)
    place(core, 0.0)
    answer(core, core.load_adapter("new", "new")[1])
    place(core, 1.0)
    assert hosts(core, "new")
    core.lose_replica(0, 1, "it died", 2.0)
    ready(core, 0, core.add_replica(0, 2.0).epoch, 2.0)
    core.lose_replica(1, 2, "it died", 2.0)
    ready(core, 1, core.add_replica(1, 2.0).epoch, 2.0)
    core.drain_events()
    place(core, 3.0)
    assert all(hosts(core, name) for name in ("a0", "a1", "new"))


def test_one_replica_has_nothing_placed() -> None:
    core = cluster(1)
    assert core.tick(0.0) == [] and core.drain_events() == []
    assert core.migration.view() is None and core.migration.hosting.placement is None


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="migration='sometimes' is unknown: use rr, proactive, dlora"):
        OrchestratorOptions(migration="sometimes")  # type: ignore[arg-type]
