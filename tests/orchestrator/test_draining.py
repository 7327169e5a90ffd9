"""A replica that drains is empty as soon as others can take what it has."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from peft_dist.core.errors import ReplicaStateError
from peft_dist.core.messages import AddRequest, Exported, ExportRequests, Heartbeat, Imported, ImportRequests
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.core.succession import DrainKept, KeepDrained
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import Notice, ReplicaDrained
from peft_dist.orchestrator.records import Outgoing
from tests.orchestrator.test_core import tokens
from tests.orchestrator.test_handover import state
from tests.orchestrator.test_hosting import answer
from tests.orchestrator.test_lifecycle import cluster, ready

WITH_KV, WITHOUT = (0.0, 0.0), (100.0, 1.0)


def crowded(number: int, transfer: tuple[float, float], **options: object) -> Orchestrator:
    """Replica 0 has so many requests, each with a token. ``transfer``: Seconds of a copy of KV, and of a byte of it."""
    core = cluster(1, max_num_seqs=8, max_queue=100, **options)
    for i in range(number):
        core.submit(NewRequest(f"r{i}", [5] * 20, SamplingParams(max_tokens=100)), 0.0)
        core.observe(0, core.replicas[0].epoch, tokens(f"r{i}-0", [1], 0), 0.5)
    for replica_id in (1, 2):
        join(core, replica_id)
    for replica in core.replicas.all():
        replica.costs = StepCosts(transfer=transfer)
    return core


def join(core: Orchestrator, replica_id: int) -> list[Outgoing]:
    """One more becomes ready; returns the loads of adapters that it is sent."""
    return ready(core, replica_id, core.add_replica(replica_id, 0.5).epoch, 0.5)  # type: ignore[return-value]


def targets(core: Orchestrator, sent: Iterable[Outgoing]) -> Counter[int]:
    """Where requests go: at once without their KV, or once it was exported; they arrive there."""
    found: Counter[int] = Counter()
    for out in sent:
        match out.command:
            case AddRequest():
                found[out.replica_id] += 1
            case ImportRequests(handover=number):
                found[out.replica_id] += 1
                found += targets(core, core.observe(out.replica_id, out.epoch, Imported(handover=number), 1.0))
            case ExportRequests(handover=number, request_ids=ids):
                report = Exported(handover=number, sequences=[state(one, 1) for one in ids])
                found += targets(core, core.observe(out.replica_id, out.epoch, report, 1.0))
    return found


@pytest.mark.parametrize("transfer", [WITH_KV, WITHOUT])
def test_the_others_share_what_it_has(transfer: tuple[float, float]) -> None:
    core = crowded(8, transfer)
    assert targets(core, core.drain_replica(0, 1.0)) == {1: 4, 2: 4}


def num_calls(work: Callable[[], object]) -> int:
    """Functions and generators that are entered."""
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("transfer", [WITH_KV, WITHOUT])
def test_what_a_drain_and_a_death_cost_goes_with_the_number_of_requests(transfer: tuple[float, float]) -> None:
    drains, deaths = [], []
    for number in (40, 80):
        core = crowded(number, transfer)
        drains.append(num_calls(lambda core=core: core.drain_replica(0, 1.0)))  # type: ignore[misc]
        # A drain takes several calls, and leaves more of many.
        other = crowded(number, transfer)
        deaths.append(num_calls(lambda core=other: core.lose_replica(0, 1, "it died", 1.0)))  # type: ignore[misc]
    assert drains[1] < 2.1 * drains[0] and deaths[1] < 2.1 * deaths[0]


def test_requests_of_a_replica_are_told_oldest_first_however_they_came_to_it() -> None:
    core = crowded(4, WITHOUT)
    for name in ("r2", "r0", "r3"):
        core.handover.move(name, 1, 1.0)
    assert [record.request_id for record in core._requests.on_replica(1)] == ["r0", "r2", "r3"]
    core.abort("r2", 1.0)
    core.lose_replica(1, core.replicas[1].epoch, "it died", 1.0)
    assert core._requests.on_replica(1) == []


def test_what_is_on_its_way_already_counts_where_it_will_be() -> None:
    core = crowded(8, WITH_KV, max_handovers=8)
    for i in range(4):
        core.handover.move(f"r{i}", 1, 1.0, with_kv=True)
    assert targets(core, core.drain_replica(0, 1.0)) == {2: 4}
    assert join(core, 3) == [], "what is on its way stays so"


def test_one_that_is_resumed_takes_what_nobody_else_could_run() -> None:
    core = cluster(2)
    answer(core, core.load_adapter("sql", "sql")[1])
    # Not yet brought what the others hold.
    join(core, 2)
    core.drain_replica(1, 1.0)
    [add] = core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9), "sql"), 1.0)
    assert add.replica_id == 0 and not targets(core, core.drain_replica(0, 2.0))
    assert targets(core, core.resume_replica(1, 3.0)) == {1: 1}


def test_it_is_drained_once_it_has_nothing_left() -> None:
    core = cluster(2)
    [add] = core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9)), 0.0)
    used, other = add.replica_id, 1 - add.replica_id

    def states() -> dict[int, str]:
        return {view.replica_id: view.state for view in core.replicas.views()}

    core.replicas[used].costs = core.replicas[other].costs = StepCosts(transfer=WITH_KV)
    core.observe(used, core.replicas[used].epoch, tokens("r-0", [1], 0), 0.5)
    [export] = core.drain_replica(used, 1.0)[1:]
    assert states() == {used: "draining", other: "ready"}, "what it has is on its way"
    number = export.command.handover  # type: ignore[union-attr]
    core.observe(used, export.epoch, Exported(handover=number, sequences=[state("r-0", 1)]), 1.1)
    assert states()[used] == "draining"
    core.observe(other, core.replicas[other].epoch, Imported(handover=number), 1.2)
    assert states() == {used: "drained", other: "ready"}
    assert [view.is_ready for view in core.replicas.views()] == [True, True]
    core.resume_replica(used, 2.0)
    assert states() == {used: "ready", other: "ready"}


def die(core: Orchestrator, replica_id: int) -> None:
    """It dies, and the next one is started."""
    core.lose_replica(replica_id, core.replicas[replica_id].epoch, "Replica 0 was killed by SIGKILL.", 1.0)
    core.tick(20.0)


def comes(core: Orchestrator, replica_id: int) -> list[Outgoing]:
    return ready(core, replica_id, core.replicas[replica_id].epoch, 9.0)  # type: ignore[return-value]


def test_one_that_was_drained_is_so_after_its_death_too_until_it_is_resumed() -> None:
    core = cluster(2)
    core.drain_replica(0, 1.0)
    core.observe(0, 1, DrainKept(), 1.0)
    die(core, 0)
    die(core, 0)
    replica = core.replicas[0]
    assert replica.state.value == "starting" and not core._calls.is_coming(replica, ""), "no request waits for it"
    core.drain_events()
    assert Outgoing(0, replica.epoch, KeepDrained(is_drained=True)) in comes(core, 0)
    assert replica.state.value == "drained" and core.replicas.ready() == [core.replicas[1]]
    text = "was drained before it died, and still is: POST /admin/resume/0 ends that"
    assert core.drain_events()[:2] == [Notice(0, text), ReplicaDrained(0, leaves=False)]
    [add] = core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9)), 9.0)
    assert add.replica_id == 1
    core.resume_replica(0, 9.0)
    assert core.submit(NewRequest("s", [5], SamplingParams(max_tokens=9)), 9.0)[0].replica_id == 0
    die(core, 0)
    comes(core, 0)
    assert core.replicas[0].state.value == "ready", "that is over"


def test_one_that_comes_drained_can_be_resumed_before() -> None:
    core = cluster(2)
    core.drain_replica(0, 1.0)
    core.lose_replica(0, 1, "it died", 1.0)
    assert core.resume_replica(0, 1.0) == []
    with pytest.raises(ReplicaStateError, match="replica 0 is dead, not draining or drained"):
        core.resume_replica(0, 1.0)
    core.tick(20.0)
    comes(core, 0)
    assert core.replicas[0].state.value == "ready"
    core = cluster(2, restart=None)
    core.drain_replica(0, 1.0)
    core.lose_replica(0, 1, "it died", 1.0)
    with pytest.raises(ReplicaStateError, match="replica 0 is dead"):
        core.resume_replica(0, 1.0)


def test_one_that_drained_to_be_restarted_serves_however_it_ended() -> None:
    for first in (False, True):
        core = crowded(2, WITHOUT)
        core.drain_replica(0, 1.0, restart=first)
        if not first:
            core.drain_replica(0, 1.0, restart=True)
        die(core, 0)
        comes(core, 0)
        assert core.replicas[0].state.value == "ready"


def test_what_whoever_drains_a_replica_is_told_of_its_end() -> None:
    core = cluster(3)
    lives = core.lives
    core.drain_replica(0, 1.0)
    lives.check_drained(0)
    core.observe(0, 1, Heartbeat(busy_seconds=0.0, is_orphaned=True), 1.0)
    lives.check_drained(0)
    core.lose_replica(0, core.replicas[0].epoch, "Replica 0 was killed by SIGKILL.", 1.0)
    died = r"lost as it drained \(Replica 0 was killed by SIGKILL\): it is started again, and stays drained until POST"
    for _ in range(2):
        with pytest.raises(ReplicaStateError, match=f"replica 0 was {died} /admin/resume/0"):
            lives.check_drained(0)
        core.tick(20.0)
    core.resume_replica(0, 9.0)
    for change, became in (
        (lambda: None, "is restarted"),
        (lambda: comes(core, 0), "was resumed"),
        (lambda: core.drain_replica(0, 9.0, restart=True), "is restarted"),
    ):
        change()
        with pytest.raises(ReplicaStateError, match=f"replica 0 {became} since"):
            lives.check_drained(0)
    core.lives.stop_restarts()
    core.drain_replica(1, 9.0)
    core.lose_replica(1, 2, "it died", 9.0)
    assert "(it died): it is not started again" in str(lives.lost_draining(1, core.replicas[1].error))
    assert str(lives.lost_draining(7, None)).endswith("it had joined, and has gone")
