"""Where a request is expected to end first."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given
from msgspec.structs import replace

from peft_dist.core.cost_model import CostModel, CostPrior, StepFeatures
from peft_dist.core.step_costs import StepCosts
from peft_dist.policy.dispatch import Backlog, Estimates, Target, Work, choose

COSTS = StepCosts()
SLOW = StepCosts(tuple(10 * c for c in COSTS.step), COSTS.load)
WORK = Work(1, prompt_tokens=100, output_tokens=50.0, adapter="red", rank_rows=64, num_bytes=10_000_000)
finish_seconds = Estimates(WORK).finish_seconds


def target(
    replica_id: int = 0,
    backlog: Backlog | None = None,
    costs: StepCosts = COSTS,
    resident: frozenset[str] = frozenset(),
    max_num_seqs: int = 8,
    capacity_tokens: int = 100_000,
) -> Target:
    return Target(replica_id, costs, backlog or Backlog(), resident, max_num_seqs, capacity_tokens)


def test_costs_are_those_of_the_model() -> None:
    model = CostModel(CostPrior(step=1.0, decode_sequence=0.5, prefill_token=0.25, lora_step=2.0, lora_token=0.1))
    costs = StepCosts.of(model)
    rows = [("", 1, 0), ("a", 1, 8), ("a", 1, 8), ("b", 1, 4)]
    assert costs.decode_seconds(1, {"a": (2, 8), "b": (1, 4)}) == model.step_seconds(StepFeatures.of(rows))
    assert costs.prefill_seconds(10) == 2.5 and costs.load_seconds(1000) == model.load_seconds(1000)


def test_of_idle_replicas_the_one_with_the_adapter_is_chosen() -> None:
    assert choose(WORK, [target(0), target(1, resident=frozenset({"red"}))]) == 1


def test_of_equal_replicas_the_one_with_less_to_do_is_chosen_and_then_the_first() -> None:
    busy = Backlog(2, 0, 60.0)
    assert choose(WORK, [target(0, busy), target(1)]) == 1
    assert choose(WORK, [target(0), target(1)]) == 0


def test_a_faster_replica_is_worth_some_backlog_but_not_any() -> None:
    some, much = Backlog(4, 0, 200.0), Backlog(400, 0, 40_000.0)
    assert choose(WORK, [target(0, costs=SLOW), target(1, some)]) == 1
    assert choose(WORK, [target(0, costs=SLOW), target(1, much)]) == 0


def test_who_captures_steps_gets_what_others_would_end_later_than_that() -> None:
    cold, step = replace(target(0), pause=0.25), COSTS.decode_seconds(8, {})
    assert choose(WORK, [cold, target(1)]) == 1, "both have nothing to do"
    for queued, chosen in ((int(0.1 / step), 1), (int(0.5 / step), 0)):
        # A queue of so many steps of all slots.
        full = Backlog(8, 0, 8.0 * queued)
        assert choose(WORK, [cold, target(1, full)]) == chosen


def test_a_resident_adapter_is_not_worth_a_long_queue() -> None:
    queue = Backlog(20, 2000, 1000.0, {"red": (20, 64)})
    assert choose(WORK, [target(0, queue, resident=frozenset({"red"})), target(1)]) == 1


def test_few_blocks_make_a_queue() -> None:
    backlog = Backlog(4, 0, 200.0)
    assert finish_seconds(target(0, backlog, capacity_tokens=300)) > finish_seconds(target(0, backlog))


@given(st.integers(0, 50), st.integers(0, 5000), st.integers(1, 4), st.booleans())
def test_more_to_do_never_ends_sooner(num_sequences: int, prefill: int, times: int, has_adapter: bool) -> None:
    adapters = {"blue": (num_sequences, 32)} if has_adapter and num_sequences else {}
    less = Backlog(num_sequences, prefill, 10.0 * num_sequences, dict(adapters))
    more = Backlog(num_sequences, prefill + 10 * times, 10.0 * num_sequences + times, dict(adapters))
    assert 0 < finish_seconds(target(0, less)) < finish_seconds(target(0, more))


@given(st.integers(0, 50), st.integers(0, 99), st.integers(0, 99))
def test_more_of_the_prompt_in_the_cache_never_ends_later(num_sequences: int, one: int, other: int) -> None:
    backlog = Backlog(num_sequences, 10 * num_sequences, 10.0 * num_sequences)
    less, more = (replace(target(0, backlog), cached_tokens=cached) for cached in sorted((one, other)))
    assert finish_seconds(more) <= finish_seconds(less)
    none = replace(less, cached_tokens=0)
    assert finish_seconds(none) == finish_seconds(target(0, backlog))


def test_a_cached_prompt_is_worth_some_backlog_but_not_any() -> None:
    long = replace(WORK, prompt_tokens=5000)
    for backlog, chosen in ((Backlog(1, 100, 60.0), 0), (Backlog(100, 100_000, 60_000.0), 1)):
        assert choose(long, [replace(target(0, backlog), cached_tokens=4900), target(1)]) == chosen
    assert choose(long, [target(0, Backlog(1, 100, 60.0)), target(1)]) == 1


def test_a_backlog_forgets_adapters_that_have_ended() -> None:
    backlog = Backlog()
    backlog.count("red", 64, 2)
    backlog.count("", 0, 1)
    backlog.count("red", 64, -1)
    assert backlog.adapters == {"red": (1, 64)} and backlog.num_sequences == 2
    backlog.count("red", 64, -1)
    assert backlog.adapters == {} and backlog.num_sequences == 1


MERGING = StepCosts(
    step=CostPrior(step=15e-3, decode_sequence=0.0, lora_step=12e-3, lora_token=0.0, adapter=0.0).step_coefficients(),
    switch=(40e-3, 0.0),
)
HERE = frozenset({"red", "blue"})


def test_nobody_is_sent_where_that_ends_the_merging_of_others() -> None:
    red, mixed = Backlog(7, 0, 350.0, {"red": (7, 64)}), Backlog(7, 0, 350.0, {"red": (4, 64), "blue": (3, 64)})
    blue = replace(WORK, adapter="blue")
    merging, other = target(0, red, MERGING, HERE), target(1, mixed, MERGING, HERE)
    assert choose(blue, [merging, other]) == 1, "which costs red's requests nothing"
    assert choose(WORK, [other, merging]) == 0, "where it runs merged"
    own = Estimates(blue).finish_seconds(merging)
    assert Estimates(blue).total_seconds(merging) > own + 7 * 12e-3, "all of them would be slower"


def test_merging_does_not_matter_where_nobody_does_it_or_it_does_not_pay() -> None:
    red = Backlog(7, 0, 350.0, {"red": (7, 64)})
    blue = replace(WORK, adapter="blue")
    for switch in (None, (100.0, 0.0)):
        one = target(0, red, replace_costs(MERGING, switch), HERE)
        assert Estimates(blue).total_seconds(one) == Estimates(blue).finish_seconds(one)


def test_a_long_queue_is_not_worth_anothers_merging() -> None:
    red, queue = Backlog(2, 0, 100.0, {"red": (2, 64)}), Backlog(60, 0, 3000.0, {"green": (30, 64), "blue": (30, 64)})
    assert choose(replace(WORK, adapter="blue"), [target(0, red, MERGING, HERE), target(1, queue, MERGING, HERE)]) == 0


def test_the_one_that_leads_is_known_as_requests_come_and_go() -> None:
    backlog = Backlog()
    for adapter, change, leading in [("a", 2, 2), ("b", 3, 3), ("b", -2, 2), ("", 5, 2), ("a", -2, 1), ("b", -1, 0)]:
        backlog.count(adapter, 8, change)
        assert backlog.leading == leading


@given(
    st.lists(st.tuples(st.sampled_from(["", "red", "blue", "green"]), st.integers(1, 3), st.booleans()), max_size=12)
)
def test_what_a_backlog_has_said_before_changes_nothing(changes: list[tuple[str, int, bool]]) -> None:
    backlog = Backlog(output_tokens=300.0)
    works = [replace(WORK, adapter=adapter, num_sequences=n) for adapter in ("", "red", "blue") for n in (1, 2)]
    # The same objects again: who has others has asked for something else.
    either = {merges: replace_costs(MERGING, (40e-3, 0.0) if merges else None) for merges in (False, True)}
    for adapter, number, merges in changes:
        own = backlog.adapters.get(adapter, (0, 0))[0]
        backlog.count(adapter, 64, -1 if own >= number else number)
        fresh = Backlog(backlog.num_sequences, 0, 300.0, dict(backlog.adapters))
        for costs in (either[merges], either[not merges]):
            for work in works:
                estimates = Estimates(work)
                known = [estimates.total_seconds(target(0, one, costs, HERE, 4)) for one in (backlog, backlog)]
                assert known == [Estimates(work).total_seconds(target(0, fresh, costs, HERE, 4))] * 2
                fresh.outlooks.clear()


def replace_costs(costs: StepCosts, switch: tuple[float, float] | None) -> StepCosts:
    return StepCosts(costs.step, costs.load, costs.fetch, costs.transfer, switch)


RANKS = {"": 0, "red": 64, "blue": 16, "green": 8}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(RANKS)), st.integers(1, 4)), max_size=12), st.sampled_from(sorted(RANKS))
)
def test_steps_are_those_of_all_that_is_there_however_it_came(changes: list[tuple[str, int]], adapter: str) -> None:
    backlog, slots = Backlog(), 4
    work = replace(WORK, adapter=adapter, rank_rows=RANKS[adapter])
    for other, number in changes:
        own = backlog.adapters.get(other, (0, 0))[0]
        backlog.count(other, RANKS[other], -own if own > number else number)
        present = dict(backlog.adapters)
        if adapter:
            present[adapter] = present.get(adapter, (0, 0))[0] + 1, RANKS[adapter]
        total = backlog.num_sequences + 1
        num_base = total - sum(count for count, _ in present.values())
        expected = COSTS.decode_seconds(num_base, present, min(1.0, slots / total))
        assert backlog.outlook(work, COSTS, slots).step == expected
