"""When replicas are given up, started again, drained and resumed."""

from __future__ import annotations

import math

import pytest

from peft_dist.core.errors import ConfigError, EngineDeadError, ReplicaStateError
from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import (
    AbortRequest,
    AdapterResult,
    AddRequest,
    Exported,
    ExportRequests,
    Heartbeat,
    Ready,
    Shutdown,
    Started,
)
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.succession import KeepDrained
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import (
    ReplicaDrained,
    ReplicaLost,
    RequestFailed,
    SequenceEvent,
    StartReplica,
)
from peft_dist.orchestrator.records import Outgoing
from tests.orchestrator.test_core import tokens
from tests.orchestrator.world import mini_spec
from tests.worker.fake_replica import fake_model

RESTART = RestartPolicy(first=1.0, longest=5.0, stable=100.0, max_failures=4)


def cluster(number: int = 2, **options: object) -> Orchestrator:
    limits = {"max_num_seqs": 8, "max_queue": 8, "seed": 0}
    core = Orchestrator(OrchestratorOptions(**{**limits, "restart": RESTART, **options}))  # type: ignore[arg-type]
    for replica_id in range(number):
        ready(core, replica_id, core.add_replica(replica_id, 0.0).epoch, 0.0)
    core.drain_events()
    return core


def ready(core: Orchestrator, replica_id: int, epoch: int, now: float) -> list[object]:
    return core.observe(replica_id, epoch, Ready(model=fake_model("org/base"), pid=7), now)  # type: ignore[return-value]


def submit(core: Orchestrator, name: str, now: float = 0.0, **params: object) -> int:
    """Returns the replica that got it."""
    [replica_id] = {out.replica_id for out in core.submit(NewRequest(name, [5], SamplingParams(**params)), now)}
    return replica_id


def test_waits_double_up_to_a_bound_and_end() -> None:
    assert [RESTART.wait(n) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, None]
    assert RestartPolicy(first=1.0, longest=3.0).wait(5) == 3.0
    assert RESTART.failures(3, served=100.0) == 1 and RESTART.failures(2, served=99.0) == 3
    with pytest.raises(ConfigError):
        RestartPolicy(first=2.0, longest=1.0)


def test_a_replica_that_keeps_dying_is_started_ever_later_and_then_no_more() -> None:
    core = cluster(1)
    now, waits = 0.0, []
    while True:
        epoch = core.replicas[0].epoch
        core.lose_replica(0, epoch, "it died", now)
        if math.isinf(core.next_deadline()):
            break
        waits.append(core.next_deadline() - now)
        assert core.tick(core.next_deadline() - 0.001) == [] and core.replicas[0].epoch == epoch
        now = core.next_deadline()
        core.tick(now)
        assert core.drain_events()[-1] == StartReplica(0, epoch + 1)
    assert waits == [1.0, 2.0, 4.0]
    assert core.health_error == "it died"


def test_a_silent_replica_is_lost_as_one_that_hangs_and_its_requests_go_on() -> None:
    core = cluster(heartbeat_timeout=3.0)
    submit(core, "r", max_tokens=4, seed=9)
    core.observe(0, 1, tokens("r-0", [1, 2], 0), 1.0)
    core.observe(1, 2, Heartbeat(busy_seconds=0.0), 2.0)
    assert core.lives.next_deadline() == 4.0 and core.tick(3.9) == []
    core.drain_events()
    stop, add = core.tick(4.0)
    assert stop.command == Shutdown() and (add.replica_id, add.epoch) == (1, 2)
    command = add.command
    assert isinstance(command, AddRequest) and command.request_id == "r-0~1" and command.age == 4.0
    assert (command.output_token_ids, command.seed, command.params.max_tokens) == ([1, 2], 9, 4)
    [lost] = core.drain_events()
    assert isinstance(lost, ReplicaLost) and lost.hangs and "silent for 3.0 s" in str(lost.error)
    # What the lost one says late is of an epoch that is over, and under a name that is over.
    assert core.observe(0, 1, tokens("r-0", [3, 4], 2, "length"), 4.1) == [] == core.drain_events()
    core.observe(1, 2, tokens("r-0", [7], 2), 4.2)
    assert core.drain_events() == []
    core.observe(1, 2, tokens("r-0~1", [3, 4], 2, "length"), 4.3)
    [end] = core.drain_events()
    assert isinstance(end, SequenceEvent) and end.progress.finish_reason == "length"


def test_silence_while_this_process_slept_is_nobodys_fault() -> None:
    core = cluster(heartbeat_timeout=3.0)
    core.lives.excuse_silence(100.0)
    assert core.tick(102.9) == [] and len(core.replicas.ready()) == 2


def test_a_loop_that_is_stuck_is_one_that_hangs() -> None:
    core = cluster(step_timeout=60.0)
    assert core.observe(0, 1, Heartbeat(busy_seconds=60.0), 1.0) == []
    assert core.observe(0, 1, Heartbeat(busy_seconds=61.0), 2.0)[0].command == Shutdown()
    [lost] = core.drain_events()
    assert isinstance(lost, ReplicaLost) and lost.hangs


def test_what_waits_too_long_for_a_replica_fails() -> None:
    core = cluster(1, max_wait=10.0, restart=RestartPolicy(first=20.0, longest=20.0))
    submit(core, "r")
    core.lose_replica(0, 1, "it died", 5.0)
    core.drain_events()
    assert core.next_deadline() == 15.0 and core.tick(14.9) == [] and core.num_unfinished == 1
    core.tick(15.0)
    [failed] = core.drain_events()
    assert isinstance(failed, RequestFailed) and "it died" in str(failed.error) and not core.num_unfinished


def test_a_request_whose_prompt_kills_is_failed_alone_after_two_replicas() -> None:
    core = cluster(3)
    for name in ("a", "b"):
        submit(core, name, max_tokens=9)
    poison = submit(core, "poison", max_tokens=9)
    others = [name for name in ("a", "b") if core._requests.running(name)[0][0].replica_id == poison]
    assert not others, "each has a replica of its own"
    submit(core, "beside", max_tokens=9)
    [record] = [r for r in core._requests.records() if r.request_id == "beside"]
    first = poison
    if record.replica_id != first:
        core._placer.move(record, core.replicas[first], 0.0)
    beside = next(iter(record.unfinished.values())).sequence_id
    epoch = core.replicas[first].epoch
    core.observe(first, epoch, Started(request_ids=[beside]), 1.0)
    core.observe(first, epoch, tokens(beside, [4], 0), 1.0)
    core.observe(first, epoch, Started(request_ids=["poison-0"]), 1.0)
    moved = [out for out in core.lose_replica(first, epoch, "it died", 2.0) if isinstance(out.command, AddRequest)]
    assert {out.command.request_id.partition("-")[0] for out in moved} == {"poison", "beside"}  # type: ignore[union-attr]
    [second] = {out.replica_id for out in moved if out.command.request_id.startswith("poison")}  # type: ignore[union-attr]
    epoch = core.replicas[second].epoch
    core.observe(second, epoch, Started(request_ids=["poison-0~1"]), 3.0)
    core.drain_events()
    core.lose_replica(second, epoch, "it died too", 3.0)
    failed = [event for event in core.drain_events() if isinstance(event, RequestFailed)]
    assert [event.request_id for event in failed] == ["poison"] and "not tried again" in str(failed[0].error)
    assert core.num_unfinished == 3


def fall_silent(core: Orchestrator, name: str, now: float) -> list[RequestFailed]:
    """Whoever has a request in a batch says nothing more, and the others do."""
    core.drain_events()
    [(record, sequence)] = core._requests.running(name)
    assert record.replica_id is not None
    replica = core.replicas[record.replica_id]
    core.observe(replica.replica_id, replica.epoch, Started(request_ids=[sequence.sequence_id]), now)
    for other in core.replicas.ready():
        if other is not replica:
            core.observe(other.replica_id, other.epoch, Heartbeat(busy_seconds=0.0), now + 4.0)
    core.tick(now + 5.0)
    assert not replica.is_alive
    return [event for event in core.drain_events() if isinstance(event, RequestFailed)]


@pytest.mark.parametrize("kind", ["local", "joined", "on Ray"])
def test_silence_over_a_network_blames_no_request_unless_it_goes_on(kind: str) -> None:
    core = cluster(0, heartbeat_timeout=5.0, by_network=kind == "on Ray")
    for replica_id in range(5):
        replica = core.replicas.join(9.0) if kind == "joined" else core.add_replica(replica_id, 0.0)
        ready(core, replica_id, replica.epoch, 0.0)
    submit(core, "r", max_tokens=9)
    number = next(number for number in range(1, 5) if fall_silent(core, "r", 5.0 * number - 5.0))
    assert number == (2 if kind == "local" else 4)
    assert len(core.replicas.ready()) == 5 - number and not core.num_unfinished


def test_a_token_between_ends_a_row_of_silences() -> None:
    core = cluster(5, heartbeat_timeout=5.0, by_network=True)
    submit(core, "r", max_tokens=9)
    for number in range(4):
        if number == 2:
            [(record, sequence)] = core._requests.running("r")
            replica = core.replicas[record.replica_id or 0]
            core.observe(replica.replica_id, replica.epoch, tokens(sequence.sequence_id, [4], 0), 10.0)
        assert fall_silent(core, "r", 5.0 * number) == []


def test_silence_over_a_network_is_not_held_against_what_was_brought_to_a_replica() -> None:
    core = cluster(1, heartbeat_timeout=5.0)
    guest = core.replicas.join(9.0)
    ready(core, 1, guest.epoch, 0.0)
    core.drain_replica(1, 0.0)
    assert submit(core, "r", max_tokens=9) == 0
    core.resume_replica(1, 0.0)
    [export] = core.handover.move("r", 1, 0.0, with_kv=True)
    assert isinstance(export.command, ExportRequests)
    core.observe(0, 1, Exported(handover=export.command.handover, sequences=[SequenceState("r-0", 0)]), 0.1)
    core.observe(0, 1, Heartbeat(busy_seconds=0.0), 4.9)
    core.tick(5.0)
    [record] = core._requests.records()
    assert (record.replica_id, record.num_import_deaths) == (0, 0)


def test_suspects_are_tried_one_after_another() -> None:
    core = cluster(2, restart=RestartPolicy(first=0.0, longest=0.0, max_failures=100))
    now = 0.0
    for name in ("a", "b", "c"):
        submit(core, name, max_tokens=9)

    def on(replica_id: int) -> list[str]:
        records = core._requests.on_replica(replica_id)
        return [s.sequence_id for record in records for s in record.unfinished.values()]

    def die_with_all_in_the_batch(replica_id: int) -> None:
        epoch = core.replicas[replica_id].epoch
        core.observe(replica_id, epoch, Started(request_ids=on(replica_id)), now)
        core.lose_replica(replica_id, epoch, "it died", now)

    core.drain_replica(1, now)
    die_with_all_in_the_batch(0)
    core.resume_replica(1, now)
    core.tick(now)
    die_with_all_in_the_batch(1)
    ready(core, 0, core.replicas[0].epoch, now)
    assert on(0) == ["a-0~2"] or len(on(0)) == 1, "only one of the suspects runs"
    tried = on(0)[0]
    core.observe(0, core.replicas[0].epoch, tokens(tried, [4], 0), now)
    assert len(on(0)) == 2, "a token clears it, and the next one is tried"
    core.drain_events()
    guilty = on(0)[1].partition("-")[0]
    die_with_all_in_the_batch(0)
    assert [e.request_id for e in core.drain_events() if isinstance(e, RequestFailed)] == [guilty]
    assert core.num_unfinished == 2


def test_draining_moves_requests_and_a_resumed_replica_takes_new_ones() -> None:
    core = cluster()
    first = submit(core, "r", max_tokens=9)
    core.observe(first, first + 1, tokens("r-0", [1], 0), 1.0)
    core.drain_events()
    kept, abort, add = core.drain_replica(first, 2.0)
    assert kept == Outgoing(first, first + 1, KeepDrained(is_drained=True))
    assert (abort.replica_id, abort.command) == (first, AbortRequest(request_ids=["r-0"]))
    assert add.replica_id == 1 - first and isinstance(add.command, AddRequest) and add.command.output_token_ids == [1]
    assert core.drain_events() == [ReplicaDrained(first, leaves=False)]
    with pytest.raises(ReplicaStateError, match="the only one"):
        core.drain_replica(1 - first, 3.0)
    core.resume_replica(first, 3.0)
    assert submit(core, "next") == first


def test_draining_to_restart_starts_at_once_and_counts_no_failure() -> None:
    core = cluster()
    [stop] = core.drain_replica(0, 1.0, restart=True)
    assert stop.command == Shutdown() and core.drain_events() == [ReplicaDrained(0, leaves=True)]
    for change in (lambda: core.resume_replica(0, 1.0), lambda: core.drain_replica(0, 1.0)):
        with pytest.raises(ReplicaStateError, match="restarted"):
            change()
    core.lose_replica(0, 1, "exited with status 0", 2.0)
    assert core.next_deadline() == 2.0 and core.replicas[0].num_failures == 0
    core.tick(2.0)
    assert isinstance(core.drain_events()[-1], StartReplica)
    with pytest.raises(ReplicaStateError, match="not started again here"):
        cluster(restart=None).drain_replica(0, 1.0, restart=True)


def test_a_crash_before_a_drained_replica_was_told_to_end_is_a_crash() -> None:
    core = cluster()
    call_id, _ = core.load_adapter("sql", "sql")
    spec = mini_spec("sql", "sql")
    for replica in core.replicas.all():
        core.observe(replica.replica_id, replica.epoch, AdapterResult(call_id=call_id, spec=spec), 0.0)
    [add] = core.submit(NewRequest("old", [5], SamplingParams(max_tokens=9), "sql"), 0.0)
    core.observe(add.replica_id, add.epoch, Started(request_ids=["old-0"]), 0.5)
    other = core.replicas[1 - add.replica_id]
    core.drain_events()
    # Nobody else holds what it needs: it stays where it is until it ends.
    core._calls._holdings.lose(other.replica_id)
    core.drain_replica(add.replica_id, 1.0, restart=True)
    assert core.drain_events() == []
    core.lose_replica(add.replica_id, add.epoch, "was killed by SIGSEGV", 2.0)
    [lost] = [event for event in core.drain_events() if isinstance(event, ReplicaLost)]
    assert not lost.was_asked
    dead = core.replicas[add.replica_id]
    assert (dead.num_failures, dead.restart_at) == (1, 3.0), "it waits before it is started again"
    [record] = core._requests.records()
    assert [sequence.num_deaths for sequence in record.unfinished.values()] == [1]


def test_when_all_are_gone_for_good_everything_fails() -> None:
    core = cluster(restart=None)
    for name in ("a", "b", "c"):
        submit(core, name)
    core.lose_replica(0, 1, "first", 1.0)
    assert core.num_unfinished == 3
    core.lose_replica(1, 2, "second", 2.0)
    failed = [event for event in core.drain_events() if isinstance(event, RequestFailed)]
    assert {event.request_id for event in failed} == {"a", "b", "c"}
    assert all(isinstance(event.error, EngineDeadError) and "second" in str(event.error) for event in failed)
