"""Credits move, and nothing else; they move to exactly those who were displaced."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from peft_dist.policy.credit_ledger import CreditLedger, displacements
from peft_dist.policy.settings import PolicySettings
from peft_dist.policy.settlement import Settlement, interruption_price
from tests.policy.queues import queue, view

ADAPTERS = st.sampled_from("abcd")


@given(st.lists(st.tuples(st.sampled_from(["move", "forget"]), ADAPTERS, ADAPTERS, st.integers(0, 100))))
def test_credits_are_conserved(moves: list[tuple[str, str, str, int]]) -> None:
    ledger = CreditLedger(10.0, 0.5)
    for kind, payer, payee, amount in moves:
        if kind == "move":
            ledger.move(payer, payee, amount / 4)
        else:
            ledger.forget(payer)
        assert ledger.total == 0
    for adapter in "abcd":
        ledger.forget(adapter)
    assert ledger.credits == {} and ledger.left_behind == 0


def test_privilege_has_hysteresis() -> None:
    ledger = CreditLedger(10.0, 0.5)
    ledger.move("hot", "a", 6.0)
    assert ledger.privileged(["hot", "a"]) == [], "not yet"
    ledger.move("hot", "a", 4.0)
    assert ledger.privileged(["hot", "a"]) == ["a"]
    ledger.grant(["a"])
    ledger.move("a", "hot", 5.0)
    assert ledger.privileged(["a"]) == ["a"], "it keeps half"
    ledger.grant([])
    assert ledger.privileged(["a"]) == [], "but not after a step without privilege"
    ledger.grant(["a"])
    ledger.move("a", "hot", 1.0)
    assert ledger.privileged(["a"]) == []


def test_who_left_is_not_privileged_on_return() -> None:
    ledger = CreditLedger(10.0, 0.5)
    ledger.grant(["a"])
    ledger.forget("a")
    ledger.move("hot", "a", 6.0)
    assert ledger.privileged(["a"]) == []


def test_the_highest_credit_goes_first() -> None:
    ledger = CreditLedger(1.0, 0.5)
    ledger.move("hot", "a", 2.0)
    ledger.move("hot", "b", 3.0)
    assert ledger.privileged(["hot", "a", "b"]) == ["b", "a"]


def test_debt_bars_from_merging_when_all_others_would_be_privileged() -> None:
    ledger = CreditLedger(10.0, 0.5, max_debt=1.0)
    assert ledger.may_merge("alone")
    ledger.know(["hot", "a", "b"])
    ledger.move("hot", "a", 20.0)
    assert ledger.may_merge("hot")
    ledger.move("hot", "b", 1.0)
    assert not ledger.may_merge("hot")
    ledger.forget("a")
    assert ledger.may_merge("hot"), "whom it owed to is gone"


def test_exact_pairing() -> None:
    """The artifact pairs by position in two differently ordered lists, and so pays adapters that were not displaced."""
    candidates = queue("abcbb").candidates
    a0, b1, c2, b3, b4 = candidates
    assert displacements([b1, b3, b4], [a0, b1, c2]) == [("b", "a"), ("b", "c")]
    assert displacements([b4, b1, c2], [a0, b1, c2]) == [("b", "a")]
    assert displacements([a0, b1, c2], [a0, b1, c2]) == []
    assert displacements([a0, c2], [a0, b1, c2, b3]) == [("a", "b"), ("c", "b")], "nobody new ran: all pay in turn"
    assert displacements([], [a0]) == []


@given(st.lists(ADAPTERS, min_size=1, max_size=12), st.data())
def test_only_adapters_with_displaced_requests_are_paid(letters: list[str], data: st.DataObject) -> None:
    candidates = list(queue("".join(letters)).candidates)
    ran = data.draw(st.permutations(candidates))[: data.draw(st.integers(1, len(candidates)))]
    reference = candidates[: data.draw(st.integers(1, len(candidates)))]
    displaced = [c.adapter for c in reference if c not in ran]
    pairs = displacements(ran, reference)
    assert [payee for _, payee in pairs] == displaced
    assert {payer for payer, _ in pairs} <= {c.adapter for c in ran}


class TestSettlement:
    def settlement(self, settings: PolicySettings | None = None) -> Settlement:
        return Settlement(CreditLedger(1.0, 0.5), settings or PolicySettings())

    def test_a_displaced_request_earns_its_share_of_the_steps_seconds(self) -> None:
        settlement, queued = self.settlement(), view("aaab")
        settlement.alone(queued, queued.alone("a"), "a")
        assert settlement.ledger.credits == pytest.approx({"a": -15e-3 / 4, "b": 15e-3 / 4})

    def test_the_artifacts_constants(self) -> None:
        settlement, queued = self.settlement(PolicySettings.artifact()), view("aaba", seats=3)
        settlement.alone(queued, queued.alone("a"), "a")
        assert settlement.ledger.credit("b") == pytest.approx(0.1125), "as many ran as would have"
        settlement.alone(queued, queued.alone("a")[:2], "a")
        assert settlement.ledger.credit("b") == pytest.approx(0.1125 * 1.5), "half when fewer ran"
        ran = [queued.runnable[i] for i in (2, 0, 3)]
        settlement.interrupted(queued, ran, queued.first_come, frozenset({"b2"}), 15 / 27)
        assert settlement.ledger.credit("a") == pytest.approx(-0.1125 * 1.5), "it displaced one of its own"

    def test_the_artifacts_constants_replace_ours_when_interrupted(self) -> None:
        settlement, queued = self.settlement(PolicySettings.artifact()), view("aab", seats=2)
        a0, _, b2 = queued.runnable
        settlement.interrupted(queued, [b2, a0], queued.alone("a"), frozenset({"b2"}), 15 / 27)
        assert settlement.ledger.credits == {"a": 1 / 16, "b": -1 / 16}

    def test_the_artifacts_displaced_are_those_of_the_first_come_batch(self) -> None:
        settlement, queued = self.settlement(PolicySettings.artifact()), view("aaba", seats=3)
        ran = [queued.runnable[i] for i in (2, 0, 1)]
        settlement.interrupted(queued, ran, queued.alone("a"), frozenset({"b2"}), 15 / 27)
        assert settlement.ledger.credits == {}

    def test_those_put_first_pay_for_whom_they_displace(self) -> None:
        settlement, queued = self.settlement(), view("aab", seats=2)
        a0, _, b2 = queued.runnable
        settlement.interrupted(queued, [b2, a0], queued.alone("a"), frozenset({"b2"}), 1.0)
        assert settlement.ledger.credits == pytest.approx({"a": 27e-3 / 2, "b": -27e-3 / 2})

    def test_and_for_whom_they_slow_down(self) -> None:
        settlement, queued = self.settlement(), view("aaaaaaaaab")
        settlement.interrupted(queued, queued.runnable, queued.alone("a"), frozenset({"b9"}), 15 / 27)
        assert settlement.ledger.credit("a") == pytest.approx(27e-3 * interruption_price(0.9, 15 / 27))
        assert settlement.ledger.credit("a") > 0

    def test_in_turn(self) -> None:
        settlement, queued = self.settlement(), view("aaaaaaaabc")
        settlement.interrupted(queued, queued.runnable, queued.alone("a"), frozenset({"b8", "c9"}), 15 / 27)
        assert settlement.ledger.credit("b") == pytest.approx(settlement.ledger.credit("c"))
        assert settlement.ledger.credit("b") < 0

    def test_who_did_not_get_to_run_slows_nobody_down(self) -> None:
        settlement, queued = self.settlement(), view("aaaaaaaaab")
        settlement.interrupted(queued, queued.alone("a"), queued.alone("a"), frozenset({"b9"}), 15 / 27)
        assert settlement.ledger.credits == {}

    def test_but_not_for_whom_they_keep_from_running(self) -> None:
        settlement, queued = self.settlement(), view("aaaaaaaaab", seats=9)
        ran = [queued.runnable[9], *queued.runnable[:8]]
        settlement.interrupted(queued, ran, queued.alone("a"), frozenset({"b9"}), 15 / 27)
        # Slowed are ten, one of them without a seat.
        displaced, slowed = 27e-3 / 9, 10 / 9 * 27e-3 * interruption_price(8 / 9, 15 / 27)
        assert settlement.ledger.credit("a") == pytest.approx(displaced + slowed)

    def test_nor_for_those_put_first_themselves(self) -> None:
        settlement, queued = self.settlement(), view("aaaaaaaaab")
        settlement.interrupted(queued, queued.runnable, queued.runnable, frozenset({"b9"}), 15 / 27)
        assert settlement.ledger.credit("a") == pytest.approx(27e-3 * interruption_price(0.9, 15 / 27))

    @pytest.mark.parametrize("share", [0.6, 0.7, 0.9, 0.97])
    def test_the_price_of_an_interruption_leads_to_the_best_share_of_merged_time(self, share: float) -> None:
        speed_ratio = 15 / 27
        price = interruption_price(share, speed_ratio)
        merged = price / (price + 1 - share)  # Where income, 1 - share a merged second, meets expense.

        def mean(f: float) -> float:
            return share / (f / speed_ratio + 1 - f) + (1 - share) / (1 - f)

        assert mean(merged) <= min(mean(i / 1000) for i in range(999)) + 1e-6

    def test_it_costs_nothing_where_merging_would_not_pay(self) -> None:
        assert interruption_price(0.5, 15 / 27) == interruption_price(0.9, 1.0) == interruption_price(1.0, 0.5) == 0
        assert interruption_price(0.9, 1.1) == 0
