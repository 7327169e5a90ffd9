"""Few requests leave a replica with their KV at once; the others run on there, and follow as those have ended."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest

from peft_dist.core.errors import ConfigError
from peft_dist.core.messages import (
    AbortRequest,
    AddRequest,
    EndExport,
    Exported,
    ExportRequests,
    Imported,
    ImportRequests,
    Started,
)
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import MovesLeft, ReplicaDrained
from peft_dist.orchestrator.records import Outgoing
from peft_dist.placement.types import MigrationPlan
from tests.orchestrator.test_core import tokens
from tests.orchestrator.test_handover import state
from tests.orchestrator.test_lifecycle import cluster, ready

# Of eight tokens, which are in one block.
KV_BYTES = 1024
FREE, DEAR = StepCosts(transfer=(0.0, 0.0)), StepCosts(transfer=(1e9, 0.0))


class Leaving:
    """Replica 0 runs so many requests, "r0", ..., each with two tokens, and more wait there; the others are idle."""

    def __init__(self, number: int, costs: StepCosts = FREE, *, waiting: int = 0, **options: object) -> None:
        self.core: Orchestrator = cluster(1, **{"max_num_seqs": 100, "max_handovers": 2} | options)
        for i in range(number + waiting):
            self.core.submit(NewRequest(f"r{i}", [5] * 6, SamplingParams(max_tokens=20)), 0.0)
        for i in range(number):
            self.say(0, Started(request_ids=[f"r{i}-0"]), 0.5)
            self.say(0, tokens(f"r{i}-0", [7, 8], 0), 0.5)
        for replica_id in (1, 2):
            ready(self.core, replica_id, self.core.add_replica(replica_id, 0.5).epoch, 0.5)
        for each in self.core.replicas.all():
            each.costs = costs
        # What was asked of replica 0 and is not answered yet: the requests of each handover, and where it goes.
        self.asked: dict[int, list[str]] = {}
        self.bringing: dict[int, int] = {}
        self.core.drain_events()

    def say(self, replica_id: int, report: object, now: float = 1.0) -> list[Outgoing]:
        return self.hear(self.core.observe(replica_id, self.core.replicas[replica_id].epoch, report, now))  # type: ignore[arg-type]

    def hear(self, sent: Iterable[Outgoing]) -> list[Outgoing]:
        out = list(sent)
        for each in out:
            match each.command:
                case ExportRequests(handover=number, request_ids=ids):
                    assert each.replica_id == 0
                    self.asked[number] = ids
                case ImportRequests(handover=number):
                    self.bringing[number] = each.replica_id
                case EndExport(handover=number):
                    self.asked.pop(number, None)
                    self.bringing.pop(number, None)
        return out

    def drain(self) -> list[Outgoing]:
        return self.hear(self.core.drain_replica(0, 1.0))

    def move(self, i: int, target: int = 1) -> list[Outgoing]:
        return self.hear(self.core.handover.move(f"r{i}", target, 1.0, with_kv=True))

    def export(self, number: int) -> list[Outgoing]:
        [sequence_id] = self.asked[number]
        name = sequence_id.rpartition("-")[0]
        [[_, sequence]] = self.core._requests.running(name)
        drawn = len(sequence.output_token_ids)
        return self.say(0, Exported(handover=number, sequences=[state(sequence_id, drawn)]))

    def bring(self, number: int) -> list[Outgoing]:
        """One that was asked for is exported and imported."""
        self.export(number)
        return self.say(self.bringing[number], Imported(handover=number))

    @property
    def leaving(self) -> list[str]:
        """Requests that are on their way."""
        return [sequence_id.rpartition("-")[0] for [sequence_id] in self.asked.values()]

    def owners(self) -> list[int | None]:
        return [record.replica_id for record in self.core._requests.records()]

    def lose(self, replica_id: int) -> list[Outgoing]:
        return self.hear(self.core.lose_replica(replica_id, self.core.replicas[replica_id].epoch, "it died", 2.0))

    @property
    def ends(self) -> dict[tuple[str, str, str], int]:
        view = self.core.migration.view()
        assert view is not None
        return view.live.ends


def test_a_drain_asks_for_few_at_once_and_for_all_in_the_end() -> None:
    world = Leaving(7)
    world.drain()
    assert world.leaving == ["r0", "r1"]
    world.export(1)
    assert world.leaving == ["r0", "r1"], "they are on their way until they have arrived"
    # What waits runs on.
    world.say(0, tokens("r5-0", [9], 2))
    while world.asked:
        world.bring(min(world.asked))
        assert len(world.asked) <= 2
    assert set(world.owners()) == {1, 2} and world.owners().count(1) in (3, 4)
    assert any(isinstance(event, ReplicaDrained) for event in world.core.drain_events())
    assert world.ends == {("drain", "kv", "moved"): 7} and world.core.handover.next_deadline() == math.inf


def test_those_that_wait_for_a_batch_have_nothing_to_bring_and_go_at_once() -> None:
    world = Leaving(4, waiting=2)
    out = world.drain()
    assert world.leaving == ["r0", "r1"] and sum(isinstance(each.command, AddRequest) for each in out) == 2
    assert world.owners()[:4] == [0] * 4 and 0 not in world.owners()[4:]


def test_who_ends_before_its_turn_is_not_asked_for() -> None:
    world = Leaving(5)
    world.drain()
    world.core.abort("r2", 1.0)
    world.say(0, tokens("r3-0", [9], 2, reason="stop"))
    world.bring(1)
    assert world.leaving == ["r1", "r4"]


def test_a_handover_that_fails_makes_room_too() -> None:
    world = Leaving(5, handover_timeout=3.0)
    world.drain()
    world.say(0, Exported(handover=1, error="no memory"))
    assert world.leaving == ["r1", "r2"], "r0 is computed again elsewhere"
    world.hear(world.core.tick(4.0))
    assert world.leaving == ["r3", "r4"], "r1 and r2 took too long"
    assert world.owners()[:3].count(0) == 0


def test_the_time_of_a_move_runs_from_its_turn_on() -> None:
    world = Leaving(3, handover_timeout=3.0)
    for i in range(3):
        world.move(i)
    world.say(0, Exported(handover=1, error="no memory"), 3.5)
    assert not world.hear(world.core.handover.tick(3.9)), "it was asked for at 1.0"
    world.hear(world.core.handover.tick(4.0))
    assert world.leaving == ["r2"] and world.core.handover.next_deadline() == 6.5


@pytest.mark.parametrize(("seconds", "patience"), [(0.5, [3.0, 4.0, 6.0]), (2.0, [8.0, 12.0, 12.0])])
def test_what_is_large_may_take_longer_but_not_for_ever(seconds: float, patience: list[float]) -> None:
    """``seconds``: What the KV of one of them takes by the costs."""
    world = Leaving(3, handover_timeout=3.0, max_handovers=4)
    world.core.replicas[1].costs = StepCosts(transfer=(0.0, seconds / KV_BYTES))
    for i in range(3):
        world.move(i)
    assert [move.deadline - 1.0 for move in world.core.handover._moves.values()] == patience


def test_where_one_goes_is_decided_in_its_turn() -> None:
    world = Leaving(4)
    world.drain()
    world.lose(1)
    while world.asked:
        number = min(world.asked)
        world.export(number)
        assert world.bringing[number] == 2
        world.say(2, Imported(handover=number))
    assert world.owners() == [2, 2, 2, 2]


def test_a_target_that_drains_takes_no_more() -> None:
    world = Leaving(4)
    world.drain()
    world.hear(world.core.drain_replica(1, 1.0))
    while world.asked:
        number = min(world.asked)
        world.export(number)
        if number in world.bringing:
            world.say(world.bringing[number], Imported(handover=number))
    assert world.owners() == [2, 2, 2, 2]


def test_a_source_that_dies_leaves_nobody_waiting() -> None:
    world = Leaving(5)
    for i in range(5):
        world.move(i)
    assert world.leaving == ["r0", "r1"]
    out = world.lose(0)
    assert sum(isinstance(each.command, AddRequest) for each in out) == 5 and None not in world.owners()
    assert world.ends == {("call", "kv", "lost"): 5}
    assert not world.core.handover._turns._waiting and not world.core.handover._turns._used


def test_a_replica_that_is_resumed_keeps_those_whose_turn_has_not_come() -> None:
    world = Leaving(5)
    world.drain()
    world.hear(world.core.resume_replica(0, 1.0))
    while world.asked:
        world.bring(min(world.asked))
    assert world.owners()[2:] == [0, 0, 0]


def test_moves_that_are_asked_for_wait_for_their_turn_too() -> None:
    world = Leaving(5)
    for i in (0, 1, 2, 3):
        world.move(i)
    # The last word counts; the place is the first one's.
    world.move(2, 2)
    assert world.leaving == ["r0", "r1"]
    world.bring(1)
    assert world.leaving == ["r1", "r2"]
    world.bring(2)
    world.bring(3)
    assert world.owners() == [1, 1, 2, 0, 0]
    assert world.leaving == ["r3"]
    world.bring(4)
    assert world.owners()[3] == 1 and world.ends == {("call", "kv", "moved"): 4}


def test_what_became_of_a_move_that_waited_is_told() -> None:
    world = Leaving(6)
    for i in (0, 1, 2, 3):
        world.move(i, 2)
    world.move(4, 1)
    world.core.abort("r2", 1.0)
    world.hear(world.core.drain_replica(1, 1.0))
    for _ in range(3):
        world.bring(min(world.asked))
    assert not world.asked and world.owners() == [2, 2, 2, 0, 0]
    assert world.ends == {("call", "kv", "moved"): 3, ("call", "kv", "ended"): 1, ("call", "kv", "stayed"): 1}


def test_moves_of_one_replica_wait_for_none_of_another() -> None:
    world = Leaving(3)
    [record] = [record for record in world.core._requests.records() if record.request_id == "r2"]
    for i in (0, 1):
        world.move(i)
    world.core._placer.move(record, world.core.replicas[1], 1.0)
    assert [each.replica_id for each in world.core.handover.move("r2", 2, 1.0, with_kv=True)] == [1]


def test_a_newer_plan_takes_the_place_of_what_is_left_of_the_last_one() -> None:
    world = Leaving(6)
    target, records = world.core.replicas[1], world.core._requests.records()
    for record in records[:5]:
        world.hear(world.core.migration.mover(record, target, 1.0))
    assert world.leaving == ["r0", "r1"]
    world.core.migration.prepare(MigrationPlan([], [], "stay", "", *[0.0] * 5))
    view = world.core.migration.view()
    assert view is not None and view.num_dropped == 3
    world.bring(1)
    world.bring(2)
    assert not world.asked and world.owners() == [1, 1, 0, 0, 0, 0]


def test_without_their_kv_all_go_at_once() -> None:
    world = Leaving(6, DEAR)
    out = world.drain()
    kinds = [type(each.command) for each in out]
    assert kinds.count(AbortRequest) == kinds.count(AddRequest) == 6 and 0 not in world.owners()


def test_no_more_bytes_than_that_are_on_their_way() -> None:
    world = Leaving(6, max_handovers=4, max_handover_bytes=3 * KV_BYTES)
    # Two blocks.
    world.say(0, tokens("r1-0", [9] * 10, 2))
    world.drain()
    assert world.leaving == ["r0", "r1"]
    world.bring(1)
    assert world.leaving == ["r1", "r2"]
    world.bring(2)
    assert world.leaving == ["r2", "r3", "r4"]


def test_a_large_one_waits_and_is_overtaken_by_none() -> None:
    world = Leaving(4, max_handovers=4, max_handover_bytes=2 * KV_BYTES)
    world.say(0, tokens("r1-0", [9] * 10, 2))
    for i in range(4):
        world.move(i)
    assert world.leaving == ["r0"]
    world.bring(1)
    assert world.leaving == ["r1"]
    world.bring(2)
    assert world.leaving == ["r2", "r3"]


def test_what_alone_is_too_large_is_computed_again() -> None:
    world = Leaving(1, max_handover_bytes=2 * KV_BYTES - 1)
    world.say(0, tokens("r0-0", [9] * 10, 2))
    assert [type(each.command) for each in world.move(0)] == [AbortRequest, AddRequest]


def test_what_has_grown_too_large_while_it_waited_goes_alone() -> None:
    world = Leaving(3, max_handover_bytes=KV_BYTES)
    for i in range(3):
        world.move(i)
    world.say(0, tokens("r1-0", [9] * 10, 2))
    world.bring(1)
    assert world.leaving == ["r1"]
    world.bring(2)
    assert world.leaving == ["r2"]


def test_of_very_many_some_leave_in_one_call() -> None:
    world = Leaving(0, waiting=40)
    core, at_once = world.core, world.core._placer.moves_at_once
    sent = [world.drain()]
    while any(isinstance(event, MovesLeft) for event in core.drain_events()):
        assert core.next_deadline() <= 1.0, "nothing else needs to happen"
        sent.append(core.tick(1.0))
    moved = [sum(isinstance(each.command, AddRequest) for each in out) for out in sent]
    assert moved == [at_once, at_once, 40 - 2 * at_once] and 0 not in world.owners()
    assert core.handover.next_deadline() == math.inf


def test_what_was_left_stays_on_a_replica_that_is_resumed() -> None:
    world = Leaving(0, waiting=40)
    world.drain()
    world.core.resume_replica(0, 1.0)
    assert world.core.handover.next_deadline() == math.inf
    world.core.tick(1.0)
    assert world.owners().count(0) == 40 - world.core._placer.moves_at_once


def test_no_room_for_any_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_handovers=0 must be 1 or more"):
        replace(OrchestratorOptions(), max_handovers=0)
    with pytest.raises(ConfigError, match="max_handover_bytes=-1 must be 0"):
        replace(OrchestratorOptions(), max_handover_bytes=-1)
