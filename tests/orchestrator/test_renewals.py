"""A replica whose connection failed goes on as another incarnation of itself, with what it holds."""

from __future__ import annotations

import pytest

from peft_dist.core.messages import (
    AdapterResult,
    AddRequest,
    AnyCommand,
    Heartbeat,
    Progress,
    Ready,
    ReplicaDetail,
    ReplicaStats,
    Shutdown,
    UnloadAdapter,
    encode_report,
)
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.succession import Adopt, KeepDrained
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import ReplicaLost, ReplicaRenewed, RequestFailed
from peft_dist.orchestrator.link import Received
from peft_dist.orchestrator.records import Outgoing, Replica
from peft_dist.orchestrator.renewals import UNREACHED_SECONDS, Renewals
from tests.orchestrator.test_core import tokens
from tests.orchestrator.test_lifecycle import cluster
from tests.orchestrator.world import MODEL, mini_spec

ORPHANED = Heartbeat(busy_seconds=0.0, is_orphaned=True)


def hold(core: Orchestrator, name: str) -> None:
    call_id, _ = core.load_adapter(name, name)
    for replica in core.replicas.ready():
        core.observe(replica.replica_id, replica.epoch, AdapterResult(call_id=call_id, spec=mini_spec(name, name)), 1.0)


def fail_link(core: Orchestrator, replica_id: int, now: float = 1.0) -> tuple[Replica, list[Outgoing]]:
    """A replica says that it heard nothing for too long; returns the one that it is to be, and what is sent."""
    out = core.observe(replica_id, core.replicas[replica_id].epoch, ORPHANED, now)
    return core.replicas[replica_id], out


def comes(core: Orchestrator, replica: Replica, *contents: str, **told: object) -> list[Outgoing]:
    """It is that one, with what it holds."""
    specs = [mini_spec(content, content) for content in contents]
    names, version = core.adapters.named(), core.adapters.version
    ready = Ready(model=MODEL, pid=1, contents=specs, names=names, names_version=version, **told)  # type: ignore[arg-type]
    return core.observe(replica.replica_id, replica.epoch, ready, 2.0)


def sent(out: list[Outgoing], kind: type[AnyCommand]) -> list[tuple[int, int, AnyCommand]]:
    return [tuple(each) for each in out if isinstance(each.command, kind)]  # type: ignore[misc]


def test_requests_wait_for_the_only_replica_also_with_an_adapter_that_has_no_name_any_more() -> None:
    core = cluster(1, restart=None)
    hold(core, "one")
    core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9), "one"), 1.0)
    core.observe(0, 1, tokens("r-0", [7, 8], 0), 1.0)
    core.unload_adapter("one")
    core.drain_events()
    replica, out = fail_link(core, 0)
    assert out == [] and replica.epoch != 1 and replica.state.value == "starting"
    events = {type(event) for event in core.drain_events()}
    assert ReplicaRenewed in events and not events & {RequestFailed, ReplicaLost}
    # What the one before says is nobody's, and what is known by then counts.
    assert core.observe(0, 1, tokens("r-0", [9], 2), 1.5) == []
    [(_, epoch, add)] = sent(comes(core, replica, "one"), AddRequest)
    assert epoch == replica.epoch and isinstance(add, AddRequest)
    assert add.output_token_ids == [7, 8] and add.content_hash == "h-one" and add.request_id != "r-0"
    # It is dropped there with its last request, as ever.
    [(_, _, unload)] = sent(core.observe(0, epoch, tokens(add.request_id, [9], 2, "stop"), 3.0), UnloadAdapter)
    assert isinstance(unload, UnloadAdapter) and unload.content_hash == "h-one"


def test_others_go_on_with_its_requests_and_no_request_is_blamed() -> None:
    core = cluster(2)
    for number in range(4):
        core.submit(NewRequest(f"r{number}", [5], SamplingParams(max_tokens=9)), 1.0)
    for _ in range(5):
        _, out = fail_link(core, 0)
        adds = sent(out, AddRequest)
        assert {replica for replica, _, _ in adds} <= {1}
        comes(core, core.replicas[0])
        _, out = fail_link(core, 1)
        comes(core, core.replicas[1])
    assert core.num_unfinished == 4
    assert not [event for event in core.drain_events() if isinstance(event, RequestFailed | ReplicaLost)]
    assert all(replica.num_restarts == replica.num_failures == 0 for replica in core.replicas.all())


@pytest.mark.parametrize("drained", [True, False])
def test_whether_it_is_drained_is_this_side_s_to_say(drained: bool) -> None:
    core = cluster(2)
    core.drain_replica(0, 1.0)
    if not drained:
        core.resume_replica(0, 1.0)
    replica, _ = fail_link(core, 0)
    out = comes(core, replica, is_drained=not drained)
    assert replica.state.value == ("drained" if drained else "ready")
    assert [command for _, _, command in sent(out, KeepDrained)] == [KeepDrained(is_drained=drained)]


def test_one_that_is_to_end_ends_and_so_do_all_when_the_server_has_stopped() -> None:
    core = cluster(2)
    core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9)), 1.0)
    core.drain_replica(0, 1.0, restart=True)
    core.drain_events()
    _, out = fail_link(core, 0)
    assert (0, 1, Shutdown()) in [tuple(each) for each in out]
    assert ReplicaLost in {type(event) for event in core.drain_events()}
    core.shut_down()
    assert fail_link(core, 1)[1] == [] and core.replicas[1].state.value == "dead"


def test_what_it_counts_goes_on_and_is_not_counted_twice() -> None:
    core = cluster(1)
    detail = ReplicaDetail(num_steps=10, num_switches=3)
    progress = Progress(sequences=[], stats=ReplicaStats(num_preemptions=2), detail=detail)
    core.observe(0, 1, progress, 1.0)
    for _ in range(3):
        replica, _ = fail_link(core, 0)
        comes(core, replica)
        totals = core.replicas.views()[0].totals
        assert (totals.num_preemptions, totals.num_switches) == (2, 3)
        core.observe(0, replica.epoch, progress, 3.0)
    assert core.replicas.views()[0].totals == totals
    core.lose_replica(0, replica.epoch, "it died", 4.0)
    core.tick(6.0)
    assert core.replicas[0].earlier == totals


class Told:
    def __init__(self, core: Orchestrator) -> None:
        self.now, self.commands = 1.0, []  # type: ignore[var-annotated]
        self.core = core
        self.renewals = Renewals(core, lambda *command: self.commands.append(command), lambda: self.now, pid=7)

    def hears(self, replica_id: int, epoch: int, busy_seconds: float = 0.0) -> bool:
        beat = encode_report(Heartbeat(busy_seconds=busy_seconds, is_orphaned=True), epoch)
        received = Received(b"", replica_id, epoch, beat)
        awaited = self.renewals.awaits(received)
        self.renewals.hear(received)
        return awaited


def test_it_is_told_once_a_second_until_it_is_the_other_and_not_for_ever() -> None:
    core = cluster(2)
    it = Told(core)
    replica, _ = fail_link(core, 0)
    it.renewals.begin(replica, 1)
    adopt = Adopt(replica_id=0, incarnation=replica.epoch, pid=7)
    assert it.commands == [(b"0.1", adopt, 1)] and replica.start_deadline == 11.0
    assert not it.hears(1, 2) and not it.hears(0, 99), "others are what they are"
    for _ in range(8):
        it.now += 0.25
        assert it.hears(0, 1)
    assert len(it.commands) == 3 and replica.start_deadline == it.now + 10.0
    assert core.replicas.views()[0].state == "unreached", "it is heard, and does not start"
    comes(core, replica)
    assert not it.hears(0, 1) and len(it.commands) == 3 and replica.start_deadline is None
    assert core.replicas.views()[0].state == "ready"


@pytest.mark.parametrize("busy", [False, True])
def test_one_that_talks_and_hears_nothing_is_given_up(busy: bool) -> None:
    core = cluster(2)
    it = Told(core)
    replica, _ = fail_link(core, 0)
    core.drain_events()
    it.renewals.begin(replica, 1)
    began = it.now
    while replica.is_alive:
        it.now += 0.25
        # In one step ever since, at whose end it may hear what it was told; or idle.
        it.hears(0, 1, it.now - began + 1.0 if busy else 0.0)
        core.tick(it.now)
    assert it.now - began == (60.0 if busy else UNREACHED_SECONDS)
    [lost] = [event for event in core.drain_events() if isinstance(event, ReplicaLost)]
    assert lost.hangs and core.replicas[0].restart_at is not None
    assert ("hears nothing" in str(lost.error)) is not busy
    assert not it.hears(0, 1), "what it says is nobody's any more"
