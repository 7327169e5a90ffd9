"""A request goes to another replica with its KV: every stage, and what fails or dies in it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from peft_dist.core.handover import KVHandle, SequenceState
from peft_dist.core.messages import (
    AbortRequest,
    AddRequest,
    EndExport,
    Exported,
    ExportRequests,
    Imported,
    ImportRequests,
    Shutdown,
    Started,
)
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import ReplicaDrained, RequestFailed, SequenceEvent
from peft_dist.orchestrator.observation import MovesView
from peft_dist.orchestrator.records import Outgoing
from tests.orchestrator.test_core import tokens
from tests.orchestrator.test_lifecycle import cluster, ready, submit

KV = KVHandle("tiny", 1, 64, "token", 1, 1)


def state(sequence_id: str, drawn: int = 2) -> SequenceState:
    return SequenceState(sequence_id, drawn, num_computed_tokens=drawn, kv=[KV])


class Moving:
    """Request "r" runs on replica ``source``, has drawn [7, 8], and is asked to go to ``target``."""

    def __init__(self, n: int = 1, replicas: int = 2, **options: object) -> None:
        self.core: Orchestrator = cluster(replicas, **options)
        self.source = submit(self.core, "r", n=n, max_tokens=9)
        self.target = 1 - self.source
        for index in range(n):
            self.say(self.source, Started(request_ids=[f"r-{index}"]))
            self.say(self.source, tokens(f"r-{index}", [7, 8], 0))
        self.core.drain_events()
        self.asked = self.core.handover.move("r", self.target, 1.0, with_kv=True)

    def say(self, replica_id: int, report: object, now: float = 1.0) -> list[Outgoing]:
        epoch = self.core.replicas[replica_id].epoch
        return self.core.observe(replica_id, epoch, report, now)  # type: ignore[arg-type]

    def export(self, *states: SequenceState) -> list[Outgoing]:
        return self.say(self.source, Exported(handover=1, sequences=list(states or [state("r-0")])))

    def lose(self, replica_id: int) -> list[Outgoing]:
        return self.core.lose_replica(replica_id, self.core.replicas[replica_id].epoch, "it died", 2.0)

    @property
    def owner(self) -> int | None:
        return self.core._requests.running("r")[0][0].replica_id

    @property
    def view(self) -> MovesView:
        """What the counts say of moves."""
        migration = self.core.migration.view()
        assert migration is not None
        return migration.live

    @property
    def ends(self) -> dict[tuple[str, str, str], int]:
        return self.view.ends

    def heard(self) -> list[int]:
        events = self.core.drain_events()
        return [token for event in events if isinstance(event, SequenceEvent) for token in event.progress.token_ids]


def commands(out: list[Outgoing], replica_id: int) -> list[object]:
    return [each.command for each in out if each.replica_id == replica_id]


def test_the_way_of_a_request_that_moves() -> None:
    moving = Moving()
    assert commands(moving.asked, moving.source) == [ExportRequests(handover=1, request_ids=["r-0"])]
    assert moving.core.handover.move("r", moving.target, 1.0) == [], "it is under way"
    assert moving.say(moving.target, Imported(handover=1)) == [], "it was not asked to"
    assert moving.say(moving.target, Exported(handover=1)) == [] and moving.owner == moving.source
    out = moving.export()
    [command] = commands(out, moving.target)
    assert len(out) == 1 and isinstance(command, ImportRequests) and command.states == [state("r-0")]
    [add] = command.requests
    assert (add.request_id, add.output_token_ids, add.seed) == ("r-0~1", [7, 8], seed_of(moving))
    assert moving.owner == moving.source
    out = moving.say(moving.target, Imported(handover=1))
    assert out == [Outgoing(moving.source, moving.source + 1, EndExport(handover=1, moved=True))]
    assert moving.owner == moving.target and moving.core.handover.num_with_kv == 1
    assert moving.core._requests.backlog(moving.target).prefill_tokens == 1
    assert moving.core._requests.backlog(moving.source).num_sequences == 0
    moving.say(moving.target, tokens("r-0~1", [9], 2))
    moving.say(moving.source, tokens("r-0", [6], 2))
    assert moving.heard() == [9], "the source's late words are nobody's"
    assert moving.core.handover.next_deadline() == math.inf
    assert moving.ends == {("call", "kv", "moved"): 1}
    view = moving.view
    assert (view.num_bytes, view.seconds[:2], sum(view.seconds)) == ({"host": KV.num_bytes}, (1, 0), 1)


def seed_of(moving: Moving) -> int:
    return moving.core._requests.running("r")[0][0].seed


def test_tokens_of_the_target_before_it_owns_the_request_are_nobodys() -> None:
    moving = Moving()
    moving.export()
    moving.say(moving.target, tokens("r-0~1", [9], 2))
    assert moving.heard() == [] and moving.owner == moving.source


@pytest.mark.parametrize("restart", [False, True])
def test_a_target_that_drains_meanwhile_takes_nothing_in(restart: bool) -> None:
    """It was told to be empty, or let go: whoever came then would have been forgotten."""
    moving = Moving()
    moving.export()
    moving.core.drain_replica(moving.target, 1.0, restart=restart)
    out = moving.say(moving.target, Imported(handover=1))
    assert commands(out, moving.target) == [AbortRequest(request_ids=["r-0~1"])]
    assert commands(out, moving.source) == [EndExport(handover=1, moved=False)]
    assert moving.owner == moving.source and moving.ends == {("call", "kv", "stayed"): 1}


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("stage", ["asked", "exported", "imported"])
def test_deaths(stage: str, victim: str) -> None:
    moving = Moving()
    if stage != "asked":
        moving.export()
    if stage == "imported":
        moving.say(moving.target, Imported(handover=1))
    out = moving.lose(getattr(moving, victim))
    adds = [each for each in out if isinstance(each.command, AddRequest)]
    if victim == ("target" if stage == "imported" else "source"):
        # It is computed again from what is known, by the other one.
        [(replica_id, _, add)] = adds
        assert isinstance(add, AddRequest) and add.output_token_ids == [7, 8]
        assert replica_id == moving.owner == (moving.source if stage == "imported" else moving.target)
        assert add.request_id == ("r-0~1" if stage == "asked" else "r-0~2"), "nobody knew it before"
        if stage == "exported":
            assert AbortRequest(request_ids=["r-0~1"]) in commands(out, moving.target)
    else:
        assert not adds and moving.owner == (moving.target if stage == "imported" else moving.source)
    end = "moved" if stage == "imported" else "lost" if victim == "source" else "stayed"
    assert moving.ends == {("call", "kv", end): 1}
    if victim == "target" and stage != "imported":
        assert EndExport(handover=1, moved=False) in commands(out, moving.source)
    assert moving.core.handover.next_deadline() == math.inf
    # Whatever the survivor still says of the handover changes nothing.
    survivor = moving.target if victim == "source" else moving.source
    owner = moving.owner
    assert moving.say(survivor, Imported(handover=1)) == [] == moving.say(survivor, Exported(handover=1))
    assert moving.owner == owner


def bring_again(moving: Moving, number: int, replica_id: int) -> list[Outgoing]:
    """Move it with its KV by hand; returns what the target is asked."""
    moving.core.handover.move("r", replica_id, 3.0, with_kv=True)
    [[_, sequence]] = moving.core._requests.running("r")
    exported = state(sequence.sequence_id, len(sequence.output_token_ids))
    return moving.say(moving.source, Exported(handover=number, sequences=[exported]))


def test_a_request_that_two_replicas_die_of_taking_in_is_failed_alone() -> None:
    moving = Moving(replicas=3)
    submit(moving.core, "other", max_tokens=9)
    moving.export()
    moving.lose(moving.target)
    # It draws at its source, where nothing is wrong with it.
    moving.say(moving.source, tokens("r-0", [9], 2))
    assert commands(bring_again(moving, 2, 2), 2)
    moving.core.drain_events()
    out = moving.lose(2)
    [failed] = [event for event in moving.core.drain_events() if isinstance(event, RequestFailed)]
    assert failed.request_id == "r" and "not tried again" in str(failed.error)
    assert AbortRequest(request_ids=["r-0"]) in commands(out, moving.source)
    assert EndExport(handover=2, moved=False) in commands(out, moving.source)
    assert [record.request_id for record in moving.core._requests.records()] == ["other"]


def test_one_death_of_taking_it_in_has_it_computed_again_from_then_on() -> None:
    moving = Moving(replicas=3, restart=RestartPolicy(first=0.0, longest=0.0))
    costs = StepCosts(transfer=(0.0, 0.0))
    for replica in moving.core.replicas.all():
        replica.costs = costs
    [record] = moving.core._requests.records()
    moving.export()
    moving.core.lose_replica(moving.target, moving.core.replicas[moving.target].epoch, "", 2.0, by_link=True)
    assert record.num_import_deaths == 0, "no fault of a request"
    [asked] = moving.core.handover.move("r", 2, 3.0)
    assert isinstance(asked.command, ExportRequests), "the cheaper way"
    moving.say(moving.source, Exported(handover=2, sequences=[state("r-0")]))
    moving.lose(2)
    assert record.num_import_deaths == 1 and record.unfinished
    moving.core.tick(4.0)
    ready(moving.core, 2, moving.core.replicas[2].epoch, 4.0)
    out = moving.core.handover.move("r", 2, 5.0)
    assert [type(each.command) for each in out] == [AbortRequest, AddRequest]
    # Once it was taken in somewhere, nothing is held against it.
    [[_, sequence]] = moving.core._requests.running("r")
    moving.source = 2
    moving.say(2, tokens(sequence.sequence_id, [9], 2))
    back = 1 if moving.target == 0 else 0
    assert commands(bring_again(moving, 3, back), back)
    moving.say(back, Imported(handover=3))
    assert record.num_import_deaths == 0 and record.replica_id == back


def test_whose_fault_it_is_that_a_replica_died_of_two_imports_is_not_known() -> None:
    moving = Moving(replicas=3)
    submit(moving.core, "s", max_tokens=9)
    core = moving.core
    for record in core._requests.records():
        record.num_import_deaths = 1
    [other] = [record for record in core._requests.records() if record.request_id == "s"]
    core._placer.move(other, core.replicas[moving.source], 1.0)
    [sequence] = other.unfinished.values()
    core.handover.move("s", moving.target, 1.0, with_kv=True)
    moving.export()
    moving.say(moving.source, Exported(handover=2, sequences=[state(sequence.sequence_id, 0)]))
    core.drain_events()
    moving.lose(moving.target)
    assert not any(isinstance(event, RequestFailed) for event in core.drain_events()) and core.num_unfinished == 2
    # Neither is brought to anybody any more.
    out = core.handover.move("r", 2, 3.0, with_kv=True)
    assert [type(each.command) for each in out] == [AbortRequest, AddRequest]


def test_what_cannot_be_imported_goes_on_where_it_was() -> None:
    moving = Moving()
    moving.export()
    out = moving.say(moving.target, Imported(handover=1, error="no blocks", is_full=True))
    assert commands(out, moving.source) == [EndExport(handover=1, moved=False)]
    assert moving.owner == moving.source and not any(isinstance(each.command, AddRequest) for each in out)
    assert moving.ends == {("call", "kv", "stayed"): 1} and moving.core.handover.num_failed == 1
    moving.say(moving.source, tokens("r-0", [9], 2))
    assert moving.heard() == [9]
    # The next try has ids of its own.
    moving.core.handover.move("r", moving.target, 2.0, with_kv=True)
    [command] = moving.say(moving.source, Exported(handover=2, sequences=[state("r-0", 3)]))
    assert isinstance(command.command, ImportRequests) and command.command.requests[0].request_id == "r-0~2"


def test_what_cannot_be_exported_is_computed_again() -> None:
    moving = Moving()
    out = moving.say(moving.source, Exported(handover=1, error="no memory"))
    assert commands(out, moving.source) == [EndExport(handover=1, moved=False), AbortRequest(request_ids=["r-0"])]
    [add] = commands(out, moving.target)
    assert isinstance(add, AddRequest) and add.output_token_ids == [7, 8] and moving.owner == moving.target


def test_what_cannot_be_read_is_computed_again_where_it_was_to_go() -> None:
    moving = Moving()
    moving.export()
    out = moving.say(moving.target, Imported(handover=1, error="the memory is gone"))
    [_, add] = commands(out, moving.target)
    assert isinstance(add, AddRequest) and add.request_id == "r-0~2" and moving.owner == moving.target
    assert moving.ends == {("call", "kv", "recomputed"): 1} and moving.view.by_way() == {"recompute": 1}
    assert commands(out, moving.source) == [EndExport(handover=1, moved=False), AbortRequest(request_ids=["r-0"])]


def test_an_export_that_does_not_fit_what_is_known_is_not_believed() -> None:
    moving = Moving()
    out = moving.export(state("r-0", 3))
    [add] = commands(out, moving.target)
    assert isinstance(add, AddRequest) and add.output_token_ids == [7, 8]


@pytest.mark.parametrize("stage", ["asked", "exported"])
def test_a_deadline_brings_it_back(stage: str) -> None:
    moving = Moving(handover_timeout=3.0)
    if stage == "exported":
        moving.export()
    assert moving.core.handover.next_deadline() == 4.0
    assert not moving.core.tick(3.9)
    out = moving.core.tick(4.0)
    assert commands(out, moving.source) == [EndExport(handover=1, moved=False)]
    aborts = [AbortRequest(request_ids=["r-0~1"])] if stage == "exported" else []
    assert commands(out, moving.target) == aborts and moving.owner == moving.source
    assert moving.say(moving.target, Imported(handover=1)) == [] and moving.owner == moving.source


@pytest.mark.parametrize("stage", ["asked", "exported"])
def test_a_client_that_goes_away(stage: str) -> None:
    moving = Moving()
    if stage == "exported":
        moving.export()
    assert commands(moving.core.abort("r", 1.0), moving.source) == [AbortRequest(request_ids=["r-0"])]
    if stage == "asked":
        out = moving.say(moving.source, Exported(handover=1))
        assert commands(out, moving.target) == []
    else:
        out = moving.say(moving.target, Imported(handover=1))
        assert commands(out, moving.target) == [AbortRequest(request_ids=["r-0~1"])]
    assert commands(out, moving.source) == [EndExport(handover=1, moved=True)]
    assert not moving.core.num_unfinished and moving.ends == {("call", "kv", "ended"): 1}


def test_one_of_two_sequences_ends_on_the_way() -> None:
    moving = Moving(n=2)
    moving.export(state("r-0"), state("r-1"))
    moving.core.abort("r", 1.0, 1)
    out = moving.say(moving.target, Imported(handover=1))
    assert commands(out, moving.target) == [AbortRequest(request_ids=["r-1~1"])]
    assert moving.owner == moving.target and len(moving.core._requests.running("r")) == 1


def test_a_draining_replica_hands_over_and_is_empty_then() -> None:
    moving = Moving()
    costs = StepCosts(transfer=(0.0, 0.0))
    for replica in moving.core.replicas.all():
        replica.costs = costs
    moving.core.drain_replica(moving.source, 1.0, restart=True)
    assert not any(isinstance(event, ReplicaDrained) for event in moving.core.drain_events())
    moving.export()
    out = moving.say(moving.target, Imported(handover=1))
    assert commands(out, moving.source) == [EndExport(handover=1, moved=True), Shutdown()]


def test_from_a_draining_replica_it_flees_without_its_kv_if_that_does_not_work() -> None:
    moving = Moving(replicas=3)
    moving.core.drain_replica(moving.source, 1.0)
    moving.export()
    out = moving.lose(moving.target)
    [add] = [each for each in out if isinstance(each.command, AddRequest)]
    assert add.replica_id == moving.owner and add.replica_id not in (moving.source, moving.target)
    assert commands(out, moving.source)[-1] == AbortRequest(request_ids=["r-0"])
    assert moving.ends == {("call", "kv", "recomputed"): 1}


def test_the_cheaper_way_is_taken() -> None:
    for transfer, kind in [(0.0, ExportRequests), (1e9, AbortRequest)]:
        core = cluster()
        source = submit(core, "r", max_tokens=9)
        target = core.replicas[1 - source]
        for replica in core.replicas.all():
            replica.costs = StepCosts(transfer=(0.0, transfer))
        core.observe(source, source + 1, Started(request_ids=["r-0"]), 1.0)
        core.observe(source, source + 1, tokens("r-0", [7, 8], 0), 1.0)
        out = core.handover.move("r", target.replica_id, 1.0)
        assert isinstance(out[0].command, kind)
        assert core.handover.num_recomputed == (kind is AbortRequest)


def test_between_replicas_of_other_numbers_of_ranks_it_is_computed_again() -> None:
    core = cluster()
    source = submit(core, "r", max_tokens=9)
    for replica in core.replicas.all():
        replica.costs = StepCosts(transfer=(0.0, 0.0))
    target = core.replicas[1 - source]
    assert target.model is not None
    target.model = replace(target.model, tensor_parallel_size=2)
    core.observe(source, source + 1, Started(request_ids=["r-0"]), 1.0)
    core.observe(source, source + 1, tokens("r-0", [7, 8], 0), 1.0)
    assert isinstance(core.handover.move("r", target.replica_id, 1.0)[0].command, AbortRequest)


def test_who_has_no_kv_is_simply_sent_elsewhere() -> None:
    core = cluster()
    source = submit(core, "r", max_tokens=9)
    for replica in core.replicas.all():
        replica.costs = StepCosts(transfer=(0.0, 0.0))
    out = core.handover.move("r", 1 - source, 1.0)
    assert isinstance(out[0].command, AbortRequest)


def test_a_request_of_the_same_name_as_one_that_has_ended_on_its_way_moves_by_itself() -> None:
    it = Moving()
    it.core.abort("r", 1.0)
    source = submit(it.core, "r", max_tokens=9)
    [record] = it.core._requests.records()
    assert not it.core.handover.is_under_way(record)
    [export] = it.core.handover.move("r", 1 - source, 1.0, with_kv=True)
    assert it.core.handover.is_under_way(record) and it.core.handover.move("r", 1 - source, 1.0, with_kv=True) == []
    # The answer to what was asked first ends that alone.
    it.export()
    assert it.core.handover.is_under_way(record)
    it.core.observe(export.replica_id, export.epoch, Exported(handover=2, sequences=[state("r-0", 0)]), 1.0)
    it.core.observe(1 - source, it.core.replicas[1 - source].epoch, Imported(handover=2), 1.0)
    assert record.replica_id == 1 - source and not it.core.handover.is_under_way(record)


def test_moves_that_make_no_sense_are_dropped() -> None:
    core = cluster()
    source = submit(core, "r", max_tokens=9)
    assert core.handover.move("r", source, 1.0) == []
    assert core.handover.move("r", 7, 1.0) == []
    assert core.handover.move("other", 1 - source, 1.0) == []
    core.drain_replica(1 - source, 1.0)
    assert core.handover.move("r", 1 - source, 1.0) == []
