"""What a request that no replica goes on with says of that."""

from __future__ import annotations

from peft_dist.core.messages import Started
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import RequestFailed
from tests.orchestrator.test_adapter_retries import answer, loads
from tests.orchestrator.test_lifecycle import cluster, ready, submit
from tests.orchestrator.test_rolling import bind
from tests.orchestrator.test_unnamed_contents import comes, waiting


def why(core: Orchestrator) -> list[str]:
    return [str(event.error) for event in core.drain_events() if isinstance(event, RequestFailed)]


def test_a_replica_that_serves_is_not_told_to_have_died() -> None:
    core = cluster(2)
    core.lose_replica(0, 1, "Replica 0 was killed by SIGKILL.", 1.0)
    core.tick(3.0)
    assert core.replicas.views()[0].error == "Replica 0 was killed by SIGKILL.", "while it starts"
    ready(core, 0, core.replicas[0].epoch, 4.0)
    assert core.replicas.views()[0].error is None
    core.lose_replica(1, 2, "Replica 1 exited with status 1.", 5.0)
    core.lose_replica(0, core.replicas[0].epoch, "Replica 0 hangs.", 6.0)
    assert core.health_error in ("Replica 0 hangs.", "Replica 1 exited with status 1.")


def test_it_names_the_adapter_and_where_it_is_not_and_what_to_do() -> None:
    core = cluster(2, restart=None)
    bind(core)
    core.replicas[1].refused["h-one"] = "/secret/one is damaged"
    core.lose_replica(0, 1, "Replica 0 was killed by SIGKILL.", 1.0)
    assert why(core) == [
        "Replica 0 was killed by SIGKILL. Adapter 'one' was refused by replica 1: load it in place, or send the "
        "request again later."
    ]
    core = waiting("unloaded")
    [load] = comes(core)
    answer(core, 0, load, 5.0, error="the files are gone")
    assert why(core) == [
        "Adapter 'one' was refused by replica 0, is not on replica 1: it was unloaded or replaced, so send the request "
        "again with an adapter that is served."
    ]


def test_whoever_has_waited_too_long_is_told_what_for() -> None:
    core = cluster(2, max_wait=10.0)
    bind(core)
    core.lose_replica(0, 1, "Replica 0 was killed by SIGKILL.", 1.0)
    core.tick(3.0)
    assert len(loads(ready(core, 0, core.replicas[0].epoch, 4.0))) == 1
    core.drain_events()
    core.tick(11.0)
    assert why(core) == [
        "No replica could go on with this in time. Adapter 'one' is on its way to replica 0, is not on replica 1: load "
        "it in place, or send the request again later."
    ]
    # One that replicas died of waits until another one was tried.
    core = cluster(2, max_wait=10.0, restart=RestartPolicy(first=0.0, longest=0.0, max_failures=100))
    for name in ("a", "b"):
        submit(core, name, max_tokens=9)
    for replica_id in (0, 1):
        epoch = core.replicas[replica_id].epoch
        for record in core._requests.records():
            if record.replica_id not in (None, replica_id):
                core._placer.move(record, core.replicas[replica_id], 0.0)
        ids = [s.sequence_id for r in core._requests.on_replica(replica_id) for s in r.unfinished.values()]
        core.observe(replica_id, epoch, Started(request_ids=ids), 0.0)
        core.lose_replica(replica_id, epoch, "it died", 0.0)
        core.tick(0.0)
    ready(core, 0, core.replicas[0].epoch, 0.0)
    core.drain_events()
    core.tick(10.0)
    [failed] = why(core)
    assert failed.endswith("with it, and such requests are tried one after another: send it again later.")
    assert core.submit(NewRequest("c", [5], SamplingParams()), 10.0)
