"""When plans are asked for, what they are made of, and what of them is carried out."""

from __future__ import annotations

import math

import pytest

from peft_dist.core.cost_model import CostPrior
from peft_dist.core.messages import AbortRequest, AddRequest, PrefetchAdapter, ReplicaDetail, ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import PlanDue
from peft_dist.orchestrator.migration import FAILED
from peft_dist.orchestrator.records import Outgoing
from peft_dist.orchestrator.survey import SLICE, Surveyed
from peft_dist.placement.planning import greedy_plan
from peft_dist.placement.triggers import TriggerSettings
from peft_dist.placement.types import AdapterStep, ClusterView, MigrationPlan, Move
from tests.orchestrator.test_core import progress, tokens
from tests.orchestrator.test_hosting import answer
from tests.orchestrator.test_lifecycle import cluster, ready
from tests.worker.fake_replica import NUM_BLOCKS


def skewed(number: int = 8, model: str | None = None, seats: int = 64, **options: object) -> Orchestrator:
    """All requests on replica 0: replica 1 became ready after they had come."""
    core = cluster(1, max_num_seqs=seats, max_queue=500, **options)
    if model is not None:
        answer(core, core.load_adapter(model, model)[1])
    for i in range(number):
        core.submit(NewRequest(f"r{i}", [5] * 20, SamplingParams(max_tokens=100, seed=i), model), 0.0)
    answer(core, ready(core, 1, core.add_replica(1, 0.0).epoch, 0.0))  # type: ignore[arg-type]
    core.drain_events()
    return core


def due(core: Orchestrator, now: float) -> list[str]:
    """Why plans are asked for at a tick."""
    core.tick(now)
    return [event.trigger for event in core.drain_events() if isinstance(event, PlanDue)]


def surveyed(core: Orchestrator, now: float = 0.0) -> Surveyed:
    survey = core.migration.survey()
    while survey.step():
        pass
    return survey.result(now)


def carry_out(core: Orchestrator, plan: MigrationPlan, seen: Surveyed, now: float) -> list[Outgoing]:
    out = core.migration.prepare(plan)
    out += core.migration.move(core.migration.chosen(plan, seen), seen, now)
    core.migration.planned(plan.origin, 0.25, now)
    return out


def plan_of(*moves: Move, steps: tuple[AdapterStep, ...] = ()) -> MigrationPlan:
    return MigrationPlan(list(moves), list(steps), "solver", "optimal", 2.0, 1.0, 1.5, 1.0, 1.5)


def test_a_skewed_load_is_shared() -> None:
    core = skewed(8, seats=4)
    assert due(core, 1.0) == ["seats"] and due(core, 2.5) == [], "one at a time"
    seen = surveyed(core)
    [one] = seen.view.classes
    assert (one.source, one.count, one.prefill_tokens, one.context_tokens, one.kv_blocks) == (0, 8, 20, 0, 2)
    out = carry_out(core, greedy_plan(seen.view), seen, 3.0)
    moved = [sent.command.request_id for sent in out if isinstance(sent.command, AddRequest)]
    assert [len(core._requests.on_replica(i)) for i in (0, 1)] == [4, 4] and len(moved) == 4
    assert moved == ["r0-0~1", "r1-0~1", "r2-0~1", "r3-0~1"], "the oldest first"
    assert sum(isinstance(sent.command, AbortRequest) and sent.replica_id == 0 for sent in out) == 4
    view = core.migration.view()
    assert view is not None and (view.kind, view.num_dropped, view.plan_seconds) == ("dlora", 0, 0.25)
    assert view.plans == {("greedy", "seats"): 1} and view.moves == {"recompute": 4}
    # The tokens go on where they were.
    core.observe(1, 2, tokens("r0-0~1", [7], 0), 4.0)
    assert core._requests.get("r0").unfinished[0].output_token_ids == [7]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["rr", "proactive"])
def test_others_never_plan(kind: str) -> None:
    core = skewed(20, migration=kind)
    assert due(core, 1.0) == due(core, 100.0) == []
    view = core.migration.view()
    assert view is not None and view.kind == kind and not view.plans


def test_one_ready_replica_has_nothing_to_plan() -> None:
    core = skewed(8)
    core.lose_replica(1, 2, "it died", 0.5)
    assert due(core, 1.0) == [] and core.migration.next_deadline() == math.inf
    assert due(cluster(2), 1.0) == [], "without requests neither"


def test_what_is_out_of_date_is_dropped() -> None:
    core = skewed(8)
    due(core, 1.0)
    seen = surveyed(core)
    plan = plan_of(Move(0, 0, 1, "", 8, "recompute"))
    chosen = core.migration.chosen(plan, seen)
    core.abort("r0", 1.0)
    # Two that were moved away, one of which is back.
    for name in ("r1", "r2"):
        core._placer.move(core._requests.get(name), core.replicas[1], 1.0)  # type: ignore[arg-type]
    core._placer.move(core._requests.get("r2"), core.replicas[0], 1.0)  # type: ignore[arg-type]
    core._requests.get("r3").is_suspect = True  # type: ignore[union-attr]
    out = core.migration.move(chosen[:5], seen, 2.0)
    assert [sent.command.request_id for sent in out if isinstance(sent.command, AddRequest)] == ["r4-0~1"]
    core.lose_replica(1, 2, "it died", 3.0)
    assert core.migration.move(chosen[5:], seen, 3.0) == []
    core.migration.planned("solver", 0.1, 3.0)
    view = core.migration.view()
    assert view is not None and (view.num_dropped, view.moves) == (7, {"recompute": 1})
    assert len(core._requests.on_replica(0)) == 7 and core.num_unfinished == 7


def test_a_replica_that_cannot_run_the_adapter_or_is_drained_gets_nothing() -> None:
    core = skewed(2, "sql")
    answer(core, core.load_adapter("old", "old")[1])
    due(core, 1.0)
    seen = surveyed(core)
    assert [one.adapter for one in seen.view.classes] == ["h-sql"]
    chosen = core.migration.chosen(plan_of(Move(0, 0, 1, "h-sql", 2, "recompute")), seen)
    core._calls._holdings._holders["h-sql"].discard(1)
    assert core.migration.move(chosen, seen, 2.0) == []
    core._calls._holdings.add(1, "h-sql")
    core.drain_replica(1, 2.0)
    assert core.migration.move(chosen, seen, 2.0) == []
    core.resume_replica(1, 2.0)
    assert core.migration.move(chosen, seen, 2.0) != []


def test_adapters_go_ahead_of_their_requests() -> None:
    core = skewed(2, "sql")
    due(core, 1.0)
    seen = surveyed(core)
    steps = AdapterStep("evict", 1, "h-x"), AdapterStep("copy", 1, "h-sql", source=0), AdapterStep("load", 7, "h-sql")
    out = carry_out(core, plan_of(Move(0, 0, 1, "h-sql", 1, "recompute"), steps=steps), seen, 2.0)
    assert [type(sent.command) for sent in out] == [PrefetchAdapter, AbortRequest, AddRequest]
    assert out[0].command == PrefetchAdapter(content_hash="h-sql")


def test_a_plan_that_failed_lets_the_next_one_come() -> None:
    core = skewed(8, triggers=TriggerSettings(starving=100.0))
    assert due(core, 1.0) == ["period"]
    core.migration.planned(FAILED, 0.0, 1.0)
    assert due(core, 1.9) == due(core, 3.0) == [] and due(core, 11.0) == ["period"]
    view = core.migration.view()
    assert view is not None and view.plans == {("failed", "period"): 1}


@pytest.mark.parametrize(
    ("trigger", "settings", "stats"),
    [
        ("memory", TriggerSettings(), ReplicaStats(num_blocks=NUM_BLOCKS, num_free_blocks=2)),
        ("imbalance", TriggerSettings(imbalance=1e-3), ReplicaStats(num_blocks=NUM_BLOCKS, num_free_blocks=NUM_BLOCKS)),
        ("starving", TriggerSettings(starving=2.0), ReplicaStats(num_blocks=NUM_BLOCKS, num_free_blocks=NUM_BLOCKS)),
    ],
)
def test_triggers(trigger: str, settings: TriggerSettings, stats: ReplicaStats) -> None:
    core = skewed(4, triggers=settings)
    assert due(core, 1.0), "whatever it is, at first there is a plan"
    core.migration.planned("stay", 0.0, 1.0)
    core.observe(0, 1, progress().__class__(sequences=[], stats=stats), 1.0)
    assert due(core, 3.5) == [trigger]


def test_what_is_not_to_be_helped_is_planned_for_less_and_less_often() -> None:
    core = skewed(4, triggers=TriggerSettings(starving=1.0, period=20.0))
    waits, now, last = [], 1.0, 1.0
    while now < 60.0:
        if due(core, now):
            waits.append(now - last)
            last = now
            core.migration.planned("stay", 0.0, now)
        now += 0.5
    assert waits[:6] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0] and max(waits) <= 20.0
    core.abort("r0", now)
    core.abort("r1", now)
    core.abort("r2", now)
    core.abort("r3", now)
    assert due(core, 80.0) == []
    core.submit(NewRequest("new", [5], SamplingParams(max_tokens=4)), 80.0)
    assert due(core, 81.5) == ["starving"], "once it was well, it is looked at every second again"


def test_a_request_that_was_moved_does_not_starve_at_once() -> None:
    core = skewed(1, triggers=TriggerSettings(starving=5.0))
    due(core, 50.0)
    core.migration.planned("stay", 0.0, 50.0)
    core._placer.move(core._requests.get("r0"), core.replicas[1], 51.0)  # type: ignore[arg-type]
    assert due(core, 52.0) == []
    assert due(core, 57.0) == ["starving"]


def test_what_a_view_says_of_requests_and_replicas() -> None:
    core = skewed(0, "sql")
    core.submit(NewRequest("two", [5] * 30, SamplingParams(n=2, max_tokens=100, seed=1), "sql"), 0.0)
    core.submit(NewRequest("base", [5] * 10, SamplingParams(max_tokens=3, seed=1)), 0.0)
    owner = {record.request_id: record.replica_id for record in core._requests.records()}
    core.observe(owner["two"], owner["two"] + 1, tokens("two-0", [7] * 5, 0), 1.0)  # type: ignore[arg-type, operator]
    core.unload_adapter("sql")
    detail = ReplicaDetail()
    stats = ReplicaStats(num_blocks=NUM_BLOCKS, num_free_blocks=40, resident_adapters=["h-sql", "h-gone"])
    core.observe(0, 1, progress().__class__(sequences=[], stats=stats, detail=detail), 1.0)
    view: ClusterView = surveyed(core).view
    view.check()
    assert [one.adapter for one in view.adapters] == ["h-sql"], "its name is gone, its requests are not"
    [two] = [one for one in view.classes if one.adapter == "h-sql"]
    # The second sequence has drawn nothing: its prompt is shared, and counted as done with the first one's.
    assert (two.source, two.count, two.context_tokens, two.kv_blocks) == (owner["two"], 1, 35, 3 + 2)
    [base] = [one for one in view.classes if not one.adapter]
    assert base.decode_tokens == pytest.approx(3, rel=0.1) and base.prefill_tokens == 10
    assert view.replicas[0].device == ["h-sql"] and view.replicas[0].free_kv_blocks == 40
    assert view.replicas[0].costs.decode_token > 0


def test_a_survey_goes_on_while_requests_end_and_replicas_die() -> None:
    core = skewed(2 * SLICE + 10)
    survey = core.migration.survey()
    assert survey.step()
    core.abort("r0", 1.0)
    core.abort(f"r{SLICE}", 1.0)
    while survey.step():
        pass
    seen = survey.result(1.0)
    names = [name for members in seen.members for name in members]
    assert len(names) == len(set(names)) == 2 * SLICE + 9, "what ended after it was seen is in it, and moves nowhere"
    survey = core.migration.survey()
    while survey.step():
        pass
    core.lose_replica(0, 1, "it died", 2.0)
    lost = survey.result(2.0)
    assert lost.view.classes == [] == lost.members
    lost.view.check()


def mixed(red: int, blue: int, seats: int = 8, switch: tuple[float, float] | None = (0.04, 0.0)) -> Orchestrator:
    """All on replica 0, whose merged steps take 15 ms and the others 27."""
    core = cluster(1, max_num_seqs=seats, max_queue=500)
    for name in ("red", "blue"):
        answer(core, core.load_adapter(name, name)[1])
    for name, count in (("red", red), ("blue", blue)):
        for i in range(count):
            core.submit(NewRequest(f"{name}{i}", [5] * 20, SamplingParams(max_tokens=100, seed=i), name), 0.0)
    answer(core, ready(core, 1, core.add_replica(1, 0.0).epoch, 0.0))  # type: ignore[arg-type]
    prior = CostPrior(step=15e-3, decode_sequence=0.0, lora_step=12e-3, lora_token=0.0, adapter=0.0)
    for replica in core.replicas.all():
        replica.costs = StepCosts(step=prior.step_coefficients(), switch=switch)
    due(core, 0.5)
    core.migration.planned("stay", 0.0, 0.5)
    core.drain_events()
    return core


def test_who_keeps_others_from_being_merged_is_moved() -> None:
    core = mixed(red=6, blue=1)
    assert due(core, 2.0) == ["mixed"]
    seen = surveyed(core)
    first, other = seen.view.replicas
    assert (first.merging, first.is_reserved, first.free_seats) == ("h-red", True, 1) and first.mixing > 0.1
    assert (other.merging, other.mixing, other.free_seats) == ("", 0.0, 8)
    plan = greedy_plan(seen.view)
    assert [(move.adapter, move.count, move.target) for move in plan.moves] == [("h-blue", 1, 1)]
    carry_out(core, plan, seen, 2.2)
    assert due(core, 4.0) == [], "red runs merged now"


@pytest.mark.parametrize(
    ("red", "blue", "switch"), [(6, 1, None), (6, 1, (60.0, 0.0)), (3, 3, (0.04, 0.0)), (6, 0, (0.04, 0.0))]
)
def test_nobody_moves_where_merging_gains_nothing(red: int, blue: int, switch: tuple[float, float] | None) -> None:
    core = mixed(red, blue, switch=switch)
    assert due(core, 2.0) == []
    assert greedy_plan(surveyed(core).view).moves == [], "seats are free, and nobody would be sooner elsewhere"


@pytest.mark.parametrize("lora_step", [12e-3, 0.0])
def test_costs_that_were_learnt_from_few_steps_stop_nobody(lora_step: float) -> None:
    """A replica that has merged little may put all of a step to the adapters: what is merged takes no time then."""
    core = mixed(red=6, blue=1)
    prior = CostPrior(
        step=0.0, decode_sequence=0.0, prefill_token=0.0, lora_step=lora_step, lora_token=0.0, adapter=0.0
    )
    for replica in core.replicas.all():
        replica.costs = StepCosts(step=prior.step_coefficients(), switch=(0.04, 0.0))
    assert due(core, 2.0) == (["mixed"] if lora_step else [])
    core.submit(NewRequest("more", [5] * 20, SamplingParams(max_tokens=100), "blue"), 2.0)
    greedy_plan(surveyed(core).view)


def test_those_that_wait_go_where_seats_are_free_and_no_further() -> None:
    core = mixed(red=10, blue=9, switch=None)
    assert due(core, 2.0) == ["imbalance"]
    view = surveyed(core).view
    assert [(r.free_seats, r.free_places) for r in view.replicas] == [(0, 0), (8, 10)], "far fewer: its share"
    for i in range(6):
        core._placer.move(core._requests.get(f"red{i}"), core.replicas[1], 2.0)  # type: ignore[arg-type]
    assert [(r.free_seats, r.free_places) for r in surveyed(core).view.replicas] == [(0, 0), (2, 2)]


def test_where_blocks_are_short_they_are_the_seats() -> None:
    core = mixed(red=5, blue=2, switch=None)
    assert due(core, 2.0) == []
    full = ReplicaStats(num_running=4, num_blocks=NUM_BLOCKS, num_free_blocks=0)
    core.observe(0, core.replicas[0].epoch, progress().__class__(sequences=[], stats=full), 2.0)
    assert [r.free_seats for r in surveyed(core).view.replicas] == [0, 8]
    assert greedy_plan(surveyed(core).view).moves, "three of seven wait for blocks"


def test_queues_that_are_about_even_are_left_alone() -> None:
    core = mixed(red=20, blue=20, switch=None)
    for i in range(17):
        core._placer.move(core._requests.get(f"red{i}"), core.replicas[1], 2.0)  # type: ignore[arg-type]
    assert due(core, 3.0) == [] and greedy_plan(surveyed(core).view).moves == []
