"""Batches are cut to seats, adapters and tokens, and pass over nobody who must not be passed over."""

from __future__ import annotations

import msgspec
import pytest

from peft_dist.core.cost_model import CostModel, CostPrior, StepFeatures
from peft_dist.policy.queue_view import QueueView
from tests.policy.queues import queue, view


def names(candidates: list) -> str:
    return "".join(c.request_id[0] for c in candidates)


def test_only_what_can_run_counts() -> None:
    queued = view("aabc", absent="b", prompts={1: 0})
    assert [c.request_id for c in queued.runnable] == ["a0", "c3"]
    assert list(queued.groups) == ["a", "c"]


def test_first_come_passes_over_adapters_beyond_the_limit_but_never_the_base() -> None:
    assert names(view("abca-b", loras=2).first_come) == "aba-b"
    assert names(view("abca-b", loras=2, seats=3).first_come) == "aba"
    assert names(view("a-b", loras=0).first_come) == "-"


def test_the_strict_prefix_ends_there() -> None:
    assert names(view("abca-b", loras=2).prefix) == "ab"


def test_those_in_front_come_first_and_nobody_twice() -> None:
    queued = view("aabb", seats=3)
    assert [c.request_id for c in queued.fill([*queued.groups["b"], *queued.runnable])] == ["b2", "b3", "a0"]


def test_nobody_younger_passes_one_that_must_not_be_passed() -> None:
    queued = view("abcabc", loras=2)
    must = queued.runnable[:3]
    assert [c.request_id for c in queued.fill([*must, *queued.runnable], must=must)] == ["a0", "b1"]
    assert names(queued.fill([*must, *queued.runnable])) == "abab"
    b0, c1, b2 = view("bcb", loras=1).runnable
    assert view("bcb", loras=1).fill([b2, c1, b0], must=[c1]) == [b0], "nor does one that was taken before"


def test_who_is_too_young_takes_no_seat_from_others() -> None:
    queued = view("bbcb", loras=1, seats=2)
    must = queued.runnable[1:]
    assert [c.request_id for c in queued.fill([*must, *queued.runnable], must=must)] == ["b1", "b0"]


def test_the_further_limit_of_seats_only_lowers_it() -> None:
    limits = (None, 2, 8)
    assert [QueueView(queue("a", seats=4), CostModel.paper(), limit).seats for limit in limits] == [4, 2, 4]


def test_around_a_merged_adapter_without_room_only_itself_and_the_base_fit() -> None:
    queued = view("b-a", loras=0)
    assert names(queued.fill(queued.runnable, merged_adapter="a")) == "-a"


def test_joined_batches_keep_a_place_for_the_merged_adapter() -> None:
    assert names(view("bcaadb", loras=2).joined("a")) == "baab"
    assert names(view("bcaadb", loras=3, seats=3).joined("a")) == "baa"
    assert names(view("b-aa", loras=1).joined("a")) == "-aa"
    assert names(view("b-aa", loras=0).joined("a")) == "aa", "the correction needs the merged adapter's rows"


@pytest.mark.parametrize(
    ("batch", "protected", "fair"),
    [("", [1], True), ("0", [1], True), ("012", [1], True), ("02", [1], False), ("20", [0], False), ("20", [], True)],
)
def test_is_fair(batch: str, protected: list[int], fair: bool) -> None:
    queued = view("abc")
    chosen = [queued.runnable[int(i)] for i in batch]
    assert queued.is_fair(chosen, [queued.runnable[i] for i in protected]) is fair


def test_features_are_those_of_what_fits_into_the_tokens() -> None:
    queued = view("ab-c", tokens=100, prompts={0: 60, 1: 60, 3: 5}, rank=8)
    assert queued.features(queued.runnable, None) == StepFeatures(False, 0, 100, 100, 2, 16, 800)
    queued = view("a-", tokens=100)
    assert queued.features(queued.runnable, "a") == StepFeatures(True, 2, 0, 1, 1, 16, 16)


def test_predictions() -> None:
    queued = view("ab", merged="a")
    assert queued.seconds(queued.runnable, None) == pytest.approx(27e-3)
    assert queued.seconds(queued.groups["a"], "a") == pytest.approx(15e-3)
    assert queued.switch("a", "a") == 0
    assert queued.switch("a", None) == queued.switch(None, "b") == pytest.approx(20e-3)


def test_ranks() -> None:
    queued = view("a", CostModel(CostPrior(merge=(0.0, 1e-3)), fixed=True), rank=8)
    assert queued.switch(None, "a") == pytest.approx(8e-3)
    assert queued.rank("b") == queued.switch(None, "b") == 0, "of whom nobody is there"


def test_what_is_held_comes_back_at_no_cost() -> None:
    state = msgspec.structs.replace(queue("abc"), holds_merged={"a", "c"}.__contains__)
    held = QueueView(state, CostModel.paper())
    assert held.switch(None, "a") == held.switch("b", "a") == held.switch("a", "c") == 0.0
    everything = QueueView(msgspec.structs.replace(state, holds_merged=lambda adapter: True), CostModel.paper())
    assert everything.switch("a", None) == 20e-3, "what is unmerged is no adapter's"
    assert held.switch(None, "b") == held.switch("a", "b") == held.switch("a", None) == 20e-3


def test_who_could_run_if_only_its_elders_were_there() -> None:
    def entitled(letters: str, absent: str, loras: int, **kwargs: dict[int, int]) -> list[str]:
        return [c.request_id for c in view(letters, absent=absent, loras=loras, **kwargs).entitled]

    assert entitled("abacb", "bc", 2) == ["a0", "b1", "a2", "b4"], "c can come only when a or b has gone"
    assert entitled("cab-", "c", 1) == ["c0", "a1", "b2", "-3"], "those that are there can run in any case"
    assert entitled("cab", "c", 2, prompts={0: 0}) == ["a1", "b2"], "who has nothing to run keeps nobody waiting"
    assert entitled("ab", "b", 1) == ["a0"] and entitled("-b", "b", 1) == ["-0", "b1"]
