"""Requests of an adapter that was unloaded or replaced while they had no replica."""

from __future__ import annotations

import pytest

from peft_dist.core.messages import (
    AdapterResult,
    AddRequest,
    Exported,
    ExportRequests,
    Imported,
    ImportRequests,
    LoadAdapter,
    UnloadAdapter,
)
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import Notice, RequestFailed
from peft_dist.orchestrator.records import Outgoing
from tests.orchestrator.test_adapter_retries import answer, loads
from tests.orchestrator.test_core import tokens
from tests.orchestrator.test_handover import state
from tests.orchestrator.test_lifecycle import cluster, ready
from tests.orchestrator.test_rolling import bind
from tests.orchestrator.world import mini_spec


def waiting(way: str, *, pinned: bool = False) -> Orchestrator:
    """A request waits for replica 0, which is started again; its adapter has lost its name meanwhile."""
    core = cluster(2)
    bind(core)
    core.lose_replica(0, 1, "Replica 0 was killed by SIGKILL.", 1.0)
    if way == "unloaded":
        core.unload_adapter("one")
    else:
        _, commands = core.load_adapter("one", "two", replace=True, pinned=pinned)
        [load] = loads(commands)  # type: ignore[arg-type]
        takes(core, 1, load)
    core.tick(3.0)
    core.drain_events()
    assert core._requests.has_unplaced
    return core


def comes(core: Orchestrator, replica_id: int = 0) -> list[LoadAdapter]:
    """It is ready; what it is brought."""
    return loads(ready(core, replica_id, core.replicas[replica_id].epoch, 4.0))


def takes(core: Orchestrator, replica_id: int, load: LoadAdapter) -> list[Outgoing]:
    result = AdapterResult(call_id=load.call_id, spec=mini_spec(load.name, load.path))
    return core.observe(replica_id, core.replicas[replica_id].epoch, result, 5.0)


@pytest.mark.parametrize("way", ["unloaded", "replaced"])
def test_it_is_brought_to_the_replica_that_they_wait_for_and_they_end_there(way: str) -> None:
    core = waiting(way, pinned=True)
    brought = {load.path: load for load in comes(core)}
    assert list(brought) == (["one"] if way == "unloaded" else ["two", "one"])
    assert not brought["one"].pinned, "the name keeps what it means now"
    [add] = [out.command for out in takes(core, 0, brought["one"]) if isinstance(out.command, AddRequest)]
    assert add.content_hash == "h-one"
    assert not [event for event in core.drain_events() if isinstance(event, RequestFailed)]
    end = core.observe(0, core.replicas[0].epoch, tokens(add.request_id, [3], 0, "stop"), 6.0)
    unload = [out.command for out in end if isinstance(out.command, UnloadAdapter)]
    assert [command.content_hash for command in unload] == ["h-one"] and not core.num_unfinished
    core.lose_replica(0, core.replicas[0].epoch, "it died", 7.0)
    core.tick(20.0)
    assert [load.path for load in comes(core)] == ([] if way == "unloaded" else ["two"]), "nobody needs it any more"


def test_what_runs_elsewhere_outlives_that_replica_too() -> None:
    core = cluster(2)
    bind(core)
    core.unload_adapter("one")
    # It comes later than the name went, and is the only one that is left.
    core.lose_replica(1, 2, "it died", 1.0)
    core.tick(3.0)
    [load] = comes(core, 1)
    takes(core, 1, load)
    out = core.lose_replica(0, 1, "it died", 6.0)
    assert [each.replica_id for each in out if isinstance(each.command, AddRequest)] == [1]


def test_they_fail_at_once_where_it_cannot_be_brought() -> None:
    core = waiting("unloaded")
    [load] = comes(core)
    answer(core, 0, load, 5.0, error="the files are gone")
    events = core.drain_events()
    assert [event.request_id for event in events if isinstance(event, RequestFailed)] == ["r"]
    [notice] = [event.text for event in events if isinstance(event, Notice)]
    assert "'one' is not served here: the files are gone. It is not tried again. It has no name any more" in notice
    assert core.replicas[0].refused == {} and core.adapters.wanted() == []


def test_a_request_that_is_aborted_needs_nothing() -> None:
    core = waiting("unloaded")
    core.abort("r", 3.0)
    assert comes(core) == []


@pytest.mark.parametrize("with_kv", [True, False])
@pytest.mark.parametrize("way", ["unloaded", "replaced"])
def test_what_runs_moves_to_whoever_has_it_and_to_whoever_is_brought_it(way: str, with_kv: bool) -> None:
    core = cluster(2)
    for out in core.load_adapter("one", "one")[1]:
        takes(core, out.replica_id, loads([out])[0])
    [sent] = core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9), "one"), 0.0)
    first = sent.replica_id
    core.observe(first, sent.epoch, tokens("r-0", [3], 0), 0.5)
    if way == "unloaded":
        core.unload_adapter("one")
    else:
        for out in core.load_adapter("one", "two", replace=True)[1]:
            takes(core, out.replica_id, loads([out])[0])
    # One that comes later.
    late = core.add_replica(2, 1.0)
    brought = {load.path: load for load in loads(ready(core, 2, late.epoch, 1.0))}
    assert core.handover.move("r", 2, 2.0, with_kv=with_kv) == [], "it has none of it yet"
    takes(core, 2, brought["one"])
    names = ["r-0"]
    for source, target in ((first, 1 - first), (1 - first, 2)):
        out = core.handover.move("r", target, 3.0, with_kv=with_kv)
        if with_kv:
            [export] = [each.command for each in out if isinstance(each.command, ExportRequests)]
            report = Exported(handover=export.handover, sequences=[state(names[-1], 1)])
            out = core.observe(source, core.replicas[source].epoch, report, 3.0)
            [command] = [each.command for each in out if isinstance(each.command, ImportRequests)]
            [add] = command.requests
            core.observe(target, core.replicas[target].epoch, Imported(handover=export.handover), 3.0)
        else:
            [add] = [each.command for each in out if isinstance(each.command, AddRequest)]
        names.append(add.request_id)
        assert add.content_hash == "h-one" and core._requests.owner(add.request_id, target)
    end = core.observe(2, late.epoch, tokens(names[-1], [4], 1, "stop"), 4.0)
    unloads = [(each.replica_id, each.command.content_hash) for each in end if isinstance(each.command, UnloadAdapter)]
    assert sorted(unloads) == [(0, "h-one"), (1, "h-one"), (2, "h-one")], "nobody needs it any more"
