"""Requests whose last replica had joined: somebody lets it join again, a moment later."""

from __future__ import annotations

from peft_dist.core.messages import AdapterResult, AddRequest, LoadAdapter, Ready, ReplicaStats, SequenceProgress
from peft_dist.core.messages import Progress as Report
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import RequestFailed
from peft_dist.orchestrator.records import Outgoing, Replica
from tests.orchestrator.world import MODEL, mini_spec


def joined(core: Orchestrator, now: float) -> tuple[Replica, list[Outgoing]]:
    """One that has joined and is ready, and what it is sent then."""
    replica = core.replicas.join(now + 9.0)
    return replica, core.observe(replica.replica_id, replica.epoch, Ready(model=MODEL, pid=1), now)


def begun(core: Orchestrator, model: str | None = None) -> None:
    """A request of which one token was drawn, on the only replica."""
    [add] = core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9), model), 1.0)
    drawn = SequenceProgress(request_id="r-0", first_index=0, token_ids=[3])
    core.observe(add.replica_id, add.epoch, Report(sequences=[drawn], stats=ReplicaStats()), 1.0)


def lose(core: Orchestrator, replica: Replica, now: float) -> None:
    core.drain_events()
    core.lose_replica(replica.replica_id, replica.epoch, "Replica 0 on far has ended.", now)


def failed(core: Orchestrator) -> list[str]:
    return [str(event.error) for event in core.drain_events() if isinstance(event, RequestFailed)]


def test_they_go_on_with_the_one_that_joins_next() -> None:
    """They failed milliseconds before it asked."""
    core = Orchestrator(OrchestratorOptions(8, 8, seed=0))
    replica, _ = joined(core, 0.0)
    begun(core)
    lose(core, replica, 2.0)
    assert failed(core) == [] and core.num_unfinished == 1
    _, out = joined(core, 20.0)
    [add] = [each.command for each in out if isinstance(each.command, AddRequest)]
    assert add.output_token_ids == [3]
    core.tick(40.0)
    assert failed(core) == [], "nothing waits any more"


def test_where_none_joins_they_fail_and_say_why() -> None:
    core = Orchestrator(OrchestratorOptions(8, 8, seed=0))
    replica, _ = joined(core, 0.0)
    begun(core)
    lose(core, replica, 2.0)
    assert core.next_deadline() == 32.0
    core.tick(31.0)
    assert failed(core) == []
    core.tick(32.0)
    assert failed(core) == ["Replica 0 on far has ended. No other one joined within 30 s."]
    assert core.num_unfinished == 0 and core.next_deadline() > 1e9


def test_one_that_joins_is_brought_what_they_use_though_it_has_no_name_any_more() -> None:
    core = Orchestrator(OrchestratorOptions(8, 8, seed=0))
    replica, _ = joined(core, 0.0)
    call_id, _ = core.load_adapter("sql", "sql")
    core.observe(replica.replica_id, replica.epoch, AdapterResult(call_id=call_id, spec=mini_spec("sql", "sql")), 0.0)
    begun(core, "sql")
    core.unload_adapter("sql")
    lose(core, replica, 2.0)
    assert failed(core) == []
    another, out = joined(core, 20.0)
    [load] = [each.command for each in out if isinstance(each.command, LoadAdapter)]
    result = AdapterResult(call_id=load.call_id, spec=mini_spec("sql", "sql"))
    out = core.observe(another.replica_id, another.epoch, result, 21.0)
    [add] = [each.command for each in out if isinstance(each.command, AddRequest)]
    assert add.output_token_ids == [3]
