"""What the orchestrator remembers of its replicas for those who watch them."""

from __future__ import annotations

import pytest

from peft_dist.core.messages import AdapterResult, LoadAdapter, Progress, Ready, ReplicaDetail, ReplicaStats
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.observation import ReplicaTotals
from tests.orchestrator.world import mini_spec
from tests.worker.fake_replica import fake_model

DETAIL = ReplicaDetail(num_steps=10, num_merged_steps=4, num_switches=3, switch_seconds=0.5, num_adapter_loads=2)


def ready(core: Orchestrator) -> int:
    """Start replica 0 once more, and return its epoch."""
    epoch = core.add_replica(0, 0.0).epoch
    core.observe(0, epoch, Ready(model=fake_model(), pid=1), 0.0)
    return epoch


def test_details_last_until_the_next_ones() -> None:
    core = Orchestrator(OrchestratorOptions())
    epoch = ready(core)
    [before] = core.replicas.views()
    assert (before.state, before.detail, before.totals) == ("ready", ReplicaDetail(), ReplicaTotals())
    core.observe(0, epoch, Progress(sequences=[], stats=ReplicaStats(), detail=DETAIL), 1.0)
    core.observe(0, epoch, Progress(sequences=[], stats=ReplicaStats(num_running=2)), 2.0)
    [view] = core.replicas.views()
    assert view.detail is DETAIL and view.stats.num_running == 2
    assert (view.totals.num_merged_steps, view.totals.num_unmerged_steps) == (4, 6)


def test_totals_go_on_in_the_next_incarnation() -> None:
    core = Orchestrator(OrchestratorOptions())
    stats = ReplicaStats(num_preemptions=1, prefix_cache_queries=8, prefix_cache_hits=5)
    for times in (1, 2, 3):
        epoch = ready(core)
        [started] = core.replicas.views()
        assert started.totals.num_switches == 3 * (times - 1) and started.detail == ReplicaDetail()
        core.observe(0, epoch, Progress(sequences=[], stats=stats, detail=DETAIL), 1.0)
        core.lose_replica(0, epoch, "it was killed", 2.0)
        core.observe(0, epoch, Progress(sequences=[], stats=stats, detail=ReplicaDetail()), 2.0)
        [lost] = core.replicas.views()
        assert lost.state == "dead" and lost.model is not None
        assert lost.totals == ReplicaTotals(
            times, 8 * times, 5 * times, 4 * times, 6 * times, 3 * times, 0.5 * times, 2 * times, 0
        )


def test_a_replica_can_serve_once_it_has_what_is_named() -> None:
    core = Orchestrator(OrchestratorOptions())
    epoch = ready(core)
    assert core.replicas.views()[0].can_serve
    for path in ("one", "two"):
        call_id, _ = core.load_adapter(path, path)
        core.observe(0, epoch, AdapterResult(call_id=call_id, spec=mini_spec(path, path)), 0.0)
    core.lose_replica(0, epoch, "it was killed", 1.0)
    assert not core.replicas.views()[0].can_serve
    epoch = core.add_replica(0, 2.0).epoch
    assert not core.replicas.views()[0].can_serve
    out = core.observe(0, epoch, Ready(model=fake_model(), pid=1), 2.0)
    loads = [each.command for each in out if isinstance(each.command, LoadAdapter)]
    [view] = core.replicas.views()
    assert view.coming == {"h-one", "h-two"} and len(loads) == 2 and not view.can_serve
    core.observe(0, epoch, AdapterResult(call_id=loads[0].call_id, spec=mini_spec("one", "one")), 3.0)
    assert core.replicas.views()[0].coming == {"h-two"}
    # What it refuses is served by nobody here, however long one waits.
    core.observe(0, epoch, AdapterResult(call_id=loads[1].call_id, error="it is damaged"), 3.0)
    [view] = core.replicas.views()
    assert view.can_serve and not view.serves_all and view.refused == {"h-two": "it is damaged"}
    assert [view.serves(content) for content in ("h-one", "h-two")] == [True, False]


@pytest.mark.parametrize("way", ["unloaded", "loaded in place", "loaded under another name", "lost"])
def test_what_a_replica_refused_is_forgotten_once_it_is_of_no_matter(way: str) -> None:
    core = Orchestrator(OrchestratorOptions())
    epoch = ready(core)
    call_id, _ = core.load_adapter("two", "two")
    core.observe(0, epoch, AdapterResult(call_id=call_id, spec=mini_spec("two", "two")), 0.0)
    core.lose_replica(0, epoch, "it was killed", 1.0)
    epoch = core.add_replica(0, 2.0).epoch
    out = core.observe(0, epoch, Ready(model=fake_model(), pid=1), 2.0)
    [load] = [each.command for each in out if isinstance(each.command, LoadAdapter)]
    core.observe(0, epoch, AdapterResult(call_id=load.call_id, error="it is damaged"), 3.0)
    assert not core.replicas.views()[0].serves_all
    if way == "unloaded":
        core.unload_adapter("two")
    elif way == "lost":
        core.lose_replica(0, epoch, "it was killed", 4.0)
        assert core.replicas.views()[0].is_ready is False
        ready(core)
        assert core.replicas.views()[0].coming == {"h-two"}, "the next one may take it"
        return
    else:
        name = "two" if way == "loaded in place" else "three"
        call_id, _ = core.load_adapter(name, "two", replace=True)
        core.observe(0, epoch, AdapterResult(call_id=call_id, spec=mini_spec(name, "two")), 5.0)
    assert core.replicas.views()[0].serves_all and not core.replicas.views()[0].refused
