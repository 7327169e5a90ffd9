"""A replica that can no longer bring an adapter to its device: its requests go on where it can be."""

from __future__ import annotations

import pytest

from peft_dist.core.messages import (
    AbortRequest,
    AddRequest,
    Progress,
    ReplicaStats,
    SequenceProgress,
    UnloadAdapter,
)
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.adapter_retries import AGAIN
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import Notice, SequenceEvent
from tests.orchestrator.test_adapter_retries import answer, loads
from tests.orchestrator.test_lifecycle import cluster
from tests.orchestrator.world import mini_spec

GONE = "adapter 'sql' in sql: the file is gone"


@pytest.fixture(params=["dlora", "rr"])
def core(request: pytest.FixtureRequest) -> Orchestrator:
    """Two replicas that have taken an adapter."""
    made = cluster(2, migration=request.param)
    for out in made.load_adapter("sql", "sql")[1]:
        answer(made, out.replica_id, out.command, 0.0, spec=mini_spec("sql", "sql"))  # type: ignore[arg-type]
    made.drain_events()
    return made


def submit(core: Orchestrator, name: str, **params: object) -> tuple[int, list[AddRequest]]:
    """Where it goes, and what is sent there."""
    sent = core.submit(NewRequest(name, [5, 6], SamplingParams(max_tokens=9, **params), "sql"), 0.0)  # type: ignore[arg-type]
    [replica_id] = {out.replica_id for out in sent if isinstance(out.command, AddRequest)}
    return replica_id, [out.command for out in sent if isinstance(out.command, AddRequest)]


def fail(core: Orchestrator, replica_id: int, sent: list[AddRequest], now: float = 1.0) -> dict[int, list[AddRequest]]:
    """A replica could not load what they need; who is sent what then."""
    ends = [
        SequenceProgress(
            each.request_id, [], len(each.output_token_ids), None, None, "error", error=GONE, lacks_adapter=True
        )
        for each in sent
    ]
    out = core.observe(replica_id, core.replicas[replica_id].epoch, Progress(sequences=ends, stats=ReplicaStats()), now)
    found: dict[int, list[AddRequest]] = {}
    for each in out:
        if isinstance(each.command, AddRequest):
            found.setdefault(each.replica_id, []).append(each.command)
    return found


def test_another_replica_goes_on_and_nothing_else_is_sent_to_the_one_that_cannot(core: Orchestrator) -> None:
    replica_id, sent = submit(core, "r", n=2)
    moved = fail(core, replica_id, sent)
    other = 1 - replica_id
    assert list(moved) == [other] and len(moved[other]) == 2
    assert not {each.request_id for each in moved[other]} & {each.request_id for each in sent}
    events = core.drain_events()
    assert not any(isinstance(event, SequenceEvent) for event in events), "the client hears of none of it"
    [text] = [event.text for event in events if isinstance(event, Notice)]
    assert GONE in text and "It is tried again in 5 s" in text
    assert core.replicas.views()[replica_id].refused == {"h-sql": GONE}
    assert {submit(core, f"s{i}")[0] for i in range(6)} == {other}


def test_it_serves_it_again_once_it_has_taken_it_anew(core: Orchestrator) -> None:
    replica_id, sent = submit(core, "r")
    fail(core, replica_id, sent, now=1.0)
    assert core.next_deadline() <= 1.0 + AGAIN.first
    [load] = loads(core.tick(1.0 + AGAIN.first))  # type: ignore[arg-type]
    answer(core, replica_id, load, 7.0, spec=mini_spec("sql", "sql"))
    assert not core.replicas.views()[replica_id].refused and core.replicas.views()[replica_id].serves_all
    assert core._calls.holders("h-sql") == {0, 1}


def test_a_request_that_none_can_run_ends_with_what_the_last_one_said(core: Orchestrator) -> None:
    replica_id, sent = submit(core, "r")
    other = 1 - replica_id
    again = fail(core, replica_id, sent)[other]
    core.drain_events()
    assert fail(core, other, again) == {}
    [event] = [event for event in core.drain_events() if isinstance(event, SequenceEvent)]
    assert event.progress.finish_reason == "error" and event.progress.error == GONE
    # It is the last one that has it, and is asked again: what it lacks may be there by then.
    assert submit(core, "s")[0] == other


def test_whoever_could_not_run_it_drops_it_with_the_others(core: Orchestrator) -> None:
    replica_id, sent = submit(core, "r")
    [[again]] = fail(core, replica_id, sent).values()
    core.abort("r", 2.0)
    out = core.unload_adapter("sql")
    told = {each.replica_id for each in out if isinstance(each.command, UnloadAdapter)}
    assert again.content_hash == "h-sql" and told == {0, 1}


def test_what_was_sent_before_that_was_known_goes_elsewhere_too(core: Orchestrator) -> None:
    requests = [submit(core, f"r{i}") for i in range(6)]
    broken = requests[0][0]
    there = [sent for replica_id, sent in requests if replica_id == broken]
    for sent in there:
        assert list(fail(core, broken, sent)) == [1 - broken]
    assert sum(isinstance(event, Notice) for event in core.drain_events()) == 1, "it is told once"


def test_it_does_not_go_to_and_fro_for_ever_between_those_that_take_it_and_cannot_load_it(core: Orchestrator) -> None:
    replica_id, sent = submit(core, "r")
    now, waits = 1.0, []
    for _ in range(2):
        moved = fail(core, replica_id, sent, now)
        waits.append(core._calls.next_deadline() - now)
        now += waits[-1]
        for load in loads(core.tick(now)):  # type: ignore[arg-type]
            answer(core, replica_id, load, now, spec=mini_spec("sql", "sql"))
        [(replica_id, sent)] = moved.items()
    assert fail(core, replica_id, sent, now) == {}
    [event] = [event for event in core.drain_events() if isinstance(event, SequenceEvent)]
    assert event.progress.error == GONE


def test_taking_it_anew_forgives_nothing_at_once(core: Orchestrator) -> None:
    """It only reads whether the files are there."""
    now, waits = 1.0, []
    for number in range(4):
        replica_id, sent = 0, []
        while not sent:
            placed, commands = submit(core, f"r{number}.{len(waits)}.{len(core._requests.records())}")
            sent = commands if placed == replica_id else []
        fail(core, replica_id, sent, now)
        waits.append(core._calls.next_deadline() - now)
        now += waits[-1]
        for load in loads(core.tick(now)):  # type: ignore[arg-type]
            answer(core, replica_id, load, now, spec=mini_spec("sql", "sql"))
    assert waits == [AGAIN.first * 2**number for number in range(4)]


def test_what_was_on_its_way_when_the_others_failed_is_ended_there(core: Orchestrator) -> None:
    replica_id, sent = submit(core, "r", n=2)
    ends = [
        SequenceProgress(sent[0].request_id, [], 0, finish_reason="error", error=GONE, lacks_adapter=True),
    ]
    report = Progress(sequences=ends, stats=ReplicaStats())
    out = core.observe(replica_id, core.replicas[replica_id].epoch, report, 1.0)
    aborted = {i for each in out if isinstance(each.command, AbortRequest) for i in each.command.request_ids}
    assert {each.request_id for each in sent} <= aborted
    assert all(each.replica_id == replica_id for each in out if isinstance(each.command, AbortRequest))
