"""A replica with very many requests is lost: others go on with them in several calls, each of which is short."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from peft_dist.core.messages import AddRequest
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import MovesLeft, RequestFailed, SequenceEvent
from peft_dist.orchestrator.records import Outgoing
from tests.orchestrator.test_adapter_retries import loads
from tests.orchestrator.test_core import tokens
from tests.orchestrator.test_lifecycle import cluster, ready
from tests.orchestrator.test_unnamed_contents import comes, takes

MANY = 40


def crowd(number: int = MANY, *, others: int = 2) -> Orchestrator:
    """Replica 0 runs so many requests, "r0", ..., each with a token; the others are idle."""
    core = cluster(1, max_num_seqs=100)
    for i in range(number):
        core.submit(NewRequest(f"r{i}", [5] * 6, SamplingParams(max_tokens=20)), 0.001 * i)
        core.observe(0, 1, tokens(f"r{i}-0", [7], 0), 0.5)
    for replica_id in range(1, 1 + others):
        ready(core, replica_id, core.add_replica(replica_id, 0.5).epoch, 0.5)
    core.drain_events()
    return core


def lose(core: Orchestrator, replica_id: int = 0) -> list[Outgoing]:
    return core.lose_replica(replica_id, core.replicas[replica_id].epoch, f"Replica {replica_id} died.", 1.0)


def adds(sent: Iterable[Outgoing]) -> list[str]:
    """Requests that are sent somewhere."""
    return [out.command.request_id.rpartition("-")[0] for out in sent if isinstance(out.command, AddRequest)]


def go_on(core: Orchestrator) -> list[list[str]]:
    """What each further call sends, while there is more."""
    found = []
    while any(isinstance(event, MovesLeft) for event in core.drain_events()):
        assert core.next_deadline() <= 1.0 or not core._requests.has_unplaced, "nothing else needs to happen"
        found.append(adds(core.tick(1.0)))
    return found


def test_some_go_elsewhere_in_one_call_oldest_first() -> None:
    core = crowd()
    at_once = core._placer.moves_at_once
    sent = [adds(lose(core)), *go_on(core)]
    assert [len(some) for some in sent] == [at_once, at_once, MANY - 2 * at_once]
    assert [name for some in sent for name in some] == [f"r{i}" for i in range(MANY)]
    assert not core._requests.has_unplaced and core._losses.next_deadline() == math.inf
    assert core._requests.backlog(1).num_sequences == core._requests.backlog(2).num_sequences == MANY // 2


def test_until_its_turn_comes_a_request_is_nobodys() -> None:
    core = crowd()
    sent = adds(lose(core))
    # What the one that was lost says late, under any id; a client that goes; one that comes.
    assert core.observe(0, 1, tokens("r39-0", [8], 1), 1.0) == []
    sent += adds(core.observe(1, core.replicas[1].epoch, tokens("r39-0~1", [8], 1), 1.0))
    assert not [event for event in core._events if isinstance(event, SequenceEvent)]
    more = [*core.abort("r38", 1.0), *core.submit(NewRequest("new", [5], SamplingParams(max_tokens=3)), 1.0)]
    rest = [*adds(more), *(name for some in go_on(core) for name in some)]
    assert sorted([*sent, *rest]) == sorted({f"r{i}" for i in range(MANY)} - {"r38"} | {"new"})


def test_another_one_that_is_lost_meanwhile_is_no_reason_to_fail_those_that_wait() -> None:
    core = crowd()
    lose(core)
    first = set(adds(lose(core, 1)))
    go_on(core)
    owners = {record.request_id: record.replica_id for record in core._requests.records()}
    assert first and owners == {f"r{i}": 2 for i in range(MANY)}


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_what_nobody_can_go_on_with_is_told_so_at_once(at_once: int) -> None:
    core = cluster(2, max_num_seqs=100)
    _, commands = core.load_adapter("one", "one")
    [mine, theirs] = [(out.replica_id, load) for out in commands for load in loads([out])]
    for replica_id, load in (mine, theirs):
        takes(core, replica_id, load)
    core._placer.moves_at_once = at_once
    core.drain_replica(1, 0.5)
    for i in range(4):
        core.submit(NewRequest(f"r{i}", [5], SamplingParams(), "one" if i == 3 else None), 0.5)
    core.resume_replica(1, 0.6)
    core._calls.lack(core.replicas[1], core.adapters.specs()[0], "the files are gone", 0.7)
    core.lives.stop_restarts()
    core.drain_events()
    sent = lose(core)
    failed = [event for event in core._events if isinstance(event, RequestFailed)]
    assert [event.request_id for event in failed] == ["r3"] and "Replica 0 died." in str(failed[0].error)
    assert adds(sent) + [name for some in go_on(core) for name in some] == ["r0", "r1", "r2"]
    assert core._losses.next_deadline() == math.inf


def test_nothing_is_due_once_those_that_were_left_have_gone() -> None:
    """Else the loop would tick for nothing, again and again."""
    core = crowd(17)
    lose(core)
    core.abort("r16", 1.0)
    assert not core._requests.has_unplaced and core._losses.next_deadline() == math.inf
    assert core.tick(1.5) == [] and core._losses.next_deadline() == math.inf
    # What waits then is placed as ever.
    lose(core, 1)
    assert core._requests.has_unplaced or len(core._requests.records()) == core._requests.backlog(2).num_sequences


def test_one_that_comes_takes_many_that_waited_in_several_calls() -> None:
    core = crowd(others=0)
    lose(core)
    core.tick(3.0)
    core.drain_events()
    assert comes(core) == []
    at_once = core._placer.moves_at_once
    assert core._requests.backlog(0).num_sequences == at_once
    while core._requests.has_unplaced:
        assert core.next_deadline() <= 4.0
        assert 0 < len(adds(core.tick(4.0))) <= at_once
    assert core._requests.backlog(0).num_sequences == MANY
