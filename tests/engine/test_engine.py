"""Every request gets the tokens it gets alone, whatever happens around it; nothing leaks."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.block_manager import BlockManager
from peft_dist.core.cost_model import CostModel
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.decisions import MAX_CREDITS, Decision
from peft_dist.engine.engine import Engine
from peft_dist.engine.limits import SchedulerLimits
from peft_dist.engine.scheduler import Scheduler
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.factory import make_policy
from peft_dist.policy.settings import PolicySettings
from tests.engine.fake_executor import EOS, FakeExecutor, tokens_alone

ADAPTERS = [None, *(AdapterSpec(f"a{i}", f"hash{i}", "", {"m": 4}, 10) for i in range(4))]


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    host: int = 0,
    depth: int = 0,
    num_slots: int = 3,
    max_seqs: int = 8,
    max_tokens: int = 16,
    max_len: int = 64,
    policy: str = "credit",
    settings: PolicySettings | None = None,
    exec_type: str = "dlora",
    **limits: object,
) -> Engine:
    blocks = BlockManager(num_blocks, block_size, host)
    cost = CostModel()
    executor = FakeExecutor(num_blocks, block_size, host)
    scheduler = Scheduler(
        SchedulerLimits(max_len, max_seqs, max_tokens, **limits),  # type: ignore[arg-type]
        blocks,
        AdapterManager(num_slots),
        make_policy(policy, exec_type, settings, cost),
    )
    engine = Engine(scheduler, executor, depth, [EOS], cost)
    for spec in ADAPTERS:
        if spec is not None:
            engine.register_adapter(spec)
    return engine


def make_request(name: str, prompt: list[int], adapter: int = 0, max_tokens: int = 6, **params: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request(name, list(prompt), sampling, seed=7, arrival_time=0.0, adapter=ADAPTERS[adapter])


def expected(request: Request) -> list[int]:
    return tokens_alone(
        request.prompt_token_ids,
        request.content_hash,
        request.seed,
        request.sequence_index,
        request.max_output_tokens,
        request.params.ignore_eos,
    )


def step(engine: Engine, into: dict[str, list[SequenceProgress]], now: float = 0.0) -> None:
    for progress in engine.step(now):
        into.setdefault(progress.request_id, []).append(progress)
    engine.scheduler.blocks.check()
    engine.scheduler.adapters.check()


def drain(engine: Engine, into: dict[str, list[SequenceProgress]], now: float = 0.0) -> None:
    for i in range(5000):
        if not engine.has_work:
            return
        step(engine, into, now + i * 0.02)
    raise AssertionError("the engine does not come to an end")


def tokens_of(progress: list[SequenceProgress]) -> list[int]:
    tokens: list[int] = []
    for item in progress:
        assert item.first_index == len(tokens)
        tokens += item.token_ids
    return tokens


def assert_empty(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert not scheduler.queue and not engine.requests and not scheduler._starts
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert not engine.executor.states and not scheduler.adapters._users  # type: ignore[attr-defined]
    assert not engine.executor.kept  # type: ignore[attr-defined]
    scheduler.blocks.check()


prompts = st.tuples(st.integers(0, 2), st.integers(1, 30)).map(
    lambda p: [1 + (i * (p[0] + 3)) % 90 for i in range(p[1])]
)


arrivals = st.tuples(prompts, st.integers(0, 4), st.integers(1, 20), st.integers(0, 12))


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(arrivals, min_size=1, max_size=12),
    aborts=st.dictionaries(st.integers(0, 11), st.integers(0, 30), max_size=4),
    depth=st.integers(0, 2),
    num_blocks=st.integers(16, 40),
    host=st.sampled_from([0, 7, 40]),
    max_seqs=st.integers(1, 8),
    max_tokens=st.integers(1, 40),
    num_slots=st.integers(1, 4),
    preemption=st.sampled_from(["auto", "recompute"]),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "merge", "credit"]),
    minority=st.booleans(),
    bound=st.sampled_from([0.0, 0.05, 5.0]),
    fixed=st.sets(st.sampled_from(["hash0", "hash1"])),
    large=st.sets(st.sampled_from(["hash0", "hash1", "hash2"])),
)  # fmt: skip
def test_tokens_are_those_of_a_request_alone(
    requests, aborts, depth, num_blocks, host, max_seqs, max_tokens, num_slots, preemption, caching, policy, minority,
    bound, fixed, large,
) -> None:  # fmt: skip
    engine = make_engine(
        num_blocks,
        4,
        host,
        depth,
        num_slots,
        max_seqs,
        max_tokens,
        policy=policy,
        settings=PolicySettings(max_adapter_wait=bound, merged_minority=minority),
        preemption=preemption,
        enable_prefix_caching=caching,
    )
    engine.executor.unmergeable |= fixed  # type: ignore[attr-defined]
    engine.executor.no_hosts |= large  # type: ignore[attr-defined]
    everyone = [
        (make_request(f"r{i}", prompt, adapter, count), arrival)
        for i, (prompt, adapter, count, arrival) in enumerate(requests)
    ]
    got: dict[str, list[SequenceProgress]] = {}
    aborted: set[str] = set()
    for now in range(31):
        for request, arrival in everyone:
            if arrival == now:
                engine.add_request(request)
        for index, when in aborts.items():
            if when == now and index < len(everyone) and everyone[index][0].request_id in engine.requests:
                aborted.add(everyone[index][0].request_id)
                engine.abort([everyone[index][0].request_id])
        step(engine, got, now * 0.02)
    drain(engine, got, 31 * 0.02)
    for request, _ in everyone:
        progress = got.get(request.request_id, [])
        if request.request_id in aborted:
            assert tokens_of(progress) == expected(request)[: len(tokens_of(progress))]
            continue
        assert tokens_of(progress) == expected(request)
        assert [bool(item.finish_reason) for item in progress] == [False] * (len(progress) - 1) + [True]
    assert engine.executor.max_batch_tokens <= max_tokens  # type: ignore[attr-defined]
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("host", "preemption"), [(0, "recompute"), (64, "swap")])
def test_preemption_happens_and_changes_nothing(depth: int, host: int, preemption: str) -> None:
    engine = make_engine(num_blocks=16, host=host, depth=depth, preemption=preemption)
    requests = [make_request(f"r{i}", [i + 1] * 12, i % 5, 30, ignore_eos=True) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert engine.scheduler.num_preemptions > 0
    assert [tokens_of(got[r.request_id]) for r in requests] == [expected(r) for r in requests]
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_prefix_hits_follow_content_not_names(depth: int) -> None:
    engine = make_engine(depth=depth)
    twin = AdapterSpec("another name", "hash0", "elsewhere", {"m": 4}, 10)
    prompt = list(range(1, 18))
    got: dict[str, list[SequenceProgress]] = {}

    def cached(name: str, spec: AdapterSpec | None) -> int:
        request = Request(name, prompt, SamplingParams(max_tokens=3), 1, 0.0, spec)
        engine.add_request(request)
        drain(engine, got)
        return got[name][-1].num_cached_tokens

    assert cached("base", None) == 0
    assert cached("base again", None) == 16
    assert cached("adapter", ADAPTERS[1]) == 0
    assert cached("same weights", twin) == 16
    assert cached("other weights", ADAPTERS[2]) == 0
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_hot_adapter_is_merged_and_others_get_their_turn(depth: int) -> None:
    engine = make_engine(depth=depth, settings=PolicySettings(max_adapter_wait=0.5))
    requests = [make_request(f"r{i}", [i + 1] * 5, 1 if i % 6 else 2, 40, ignore_eos=True) for i in range(12)]
    for request in requests:
        engine.add_request(request)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert [tokens_of(got[r.request_id]) for r in requests] == [expected(r) for r in requests]
    assert engine.executor.modes == {False, True}  # type: ignore[attr-defined]
    assert engine.num_switches > 1
    assert_empty(engine)


def test_what_cannot_be_merged_runs_unmerged() -> None:
    for policy in ("credit", "merge"):
        engine = make_engine(policy=policy)
        engine.executor.unmergeable.add("hash0")  # type: ignore[attr-defined]
        request = make_request("r", [4] * 5, 1, 9)
        engine.add_request(request)
        got: dict[str, list[SequenceProgress]] = {}
        drain(engine, got)
        assert tokens_of(got["r"]) == expected(request)
        assert engine.executor.modes == {False}  # type: ignore[attr-defined]


def observed_switches(engine: Engine) -> list[tuple[str, float]]:
    """What the cost model is told from now on."""
    seen: list[tuple[str, float]] = []
    observe = engine.cost.observe_switch
    engine.cost.observe_switch = lambda kind, seconds, rows=0: (  # type: ignore[method-assign]
        seen.append((kind, seconds)), observe(kind, seconds, rows)
    )[1]  # fmt: skip
    return seen


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_merge_that_costs_nothing_teaches_nothing(depth: int, late: bool) -> None:
    """The shadow holds what was merged last: had its return been learned, every merge would look cheap."""
    engine = make_engine(policy="merge", depth=depth)
    engine.executor.late_switches = late  # type: ignore[attr-defined]
    seen = observed_switches(engine)
    for name, adapter in (("a", 1), ("base", 0), ("again", 1), ("other", 2)):
        engine.add_request(make_request(name, [4] * 5, adapter, 2, ignore_eos=True))
        drain(engine, {})
    assert engine.num_switches == 4
    assert seen == [("merge", 0.005), ("unmerge", 0.0), ("merge", 0.005)]


def test_every_merged_model_that_is_still_there_comes_back_for_nothing() -> None:
    """Not the latest alone: with exec_type="vllm" several are."""
    engine = make_engine(policy="merge")
    engine.executor.num_held = 2  # type: ignore[attr-defined]
    seen = observed_switches(engine)
    asked: list[set[str]] = []
    choose = engine.scheduler.policy.choose
    engine.scheduler.policy.choose = (
        lambda state: (  # type: ignore[method-assign]
            asked.append({spec.content_hash for spec in ADAPTERS[1:] if state.holds_merged(spec.content_hash)}),
            choose(state),
        )[1]
    )
    for name, adapter in (("a", 1), ("b", 2), ("again", 1), ("other", 3), ("b again", 2)):
        engine.add_request(make_request(name, [4] * 5, adapter, 1, ignore_eos=True))
        drain(engine, {})
    assert engine.num_switches == 5
    assert seen == [("merge", 0.005)] * 4
    assert {"hash0", "hash1"} in asked and {"hash0", "hash2"} in asked


@pytest.mark.parametrize("depth", [0, 1])
def test_a_switch_whose_seconds_come_later_counts_when_they_come(depth: int) -> None:
    decisions: list[Decision] = []
    engine = make_engine(policy="merge", depth=depth)
    engine.executor.late_switches = True  # type: ignore[attr-defined]
    engine.on_decision = decisions.append
    seen = observed_switches(engine)
    engine.add_request(make_request("r", [4] * 5, 1, 3, ignore_eos=True))
    step(engine, {})
    assert engine.num_switches == 1
    assert decisions[0].switch_seconds is None
    assert (engine.switch_seconds, seen) == ((0.0, []) if depth else (0.005, [("merge", 0.005)]))
    drain(engine, {})
    assert engine.detail().switch_seconds == engine.switch_seconds == 0.005
    assert seen == [("merge", 0.005)]
    assert [decision.switch_seconds for decision in decisions[1:]] == [0.0, 0.0]


def test_the_seconds_of_a_failed_merge_are_nobodys() -> None:
    """The base comes back after it, and that switch was not asked for."""
    engine = make_engine(policy="merge")
    engine.executor.late_switches = True  # type: ignore[attr-defined]
    engine.executor.failing_merges.add("hash0")  # type: ignore[attr-defined]
    seen = observed_switches(engine)
    engine.add_request(make_request("r", [4] * 5, 1, 3, ignore_eos=True))
    drain(engine, {})
    assert (engine.num_switches, engine.switch_seconds, seen) == (0, 0.0, [])


@pytest.mark.parametrize("depth", [0, 1])
def test_a_merge_that_fails_costs_nobody_an_answer(depth: int) -> None:
    engine = make_engine(policy="merge", depth=depth)
    executor = engine.executor
    executor.failing_merges.add("hash0")  # type: ignore[attr-defined]
    requests = [make_request(f"r{i}", [4] * 9, adapter, 6) for i, adapter in enumerate((2, 1, 1, 2))]
    got: dict[str, list[SequenceProgress]] = {}
    for request in requests:
        engine.add_request(request)
        drain(engine, got)
    assert [tokens_of(got[r.request_id]) for r in requests] == [expected(r) for r in requests]
    assert executor.modes == {False, True}  # type: ignore[attr-defined]
    assert executor.merged_adapter() == "hash1"
    assert_empty(engine)


def test_a_merge_that_failed_is_not_tried_again_by_a_baseline_that_only_merges() -> None:
    engine = make_engine(policy="merge", exec_type="peft")
    tried: list[str] = []
    switch = engine.executor.switch

    def counted(spec: AdapterSpec | None) -> float | None:
        tried.append(spec.content_hash if spec else "")
        return switch(spec)

    engine.executor.switch = counted  # type: ignore[method-assign]
    engine.executor.failing_merges.add("hash0")  # type: ignore[attr-defined]
    request = make_request("r", [4] * 5, 1, 6, ignore_eos=True)
    engine.add_request(request)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert tried.count("hash0") == 1
    assert tokens_of(got["r"]) == expected(request)


def test_requests_that_a_step_passes_over_are_waiting_for_those_who_route() -> None:
    """They keep their blocks, and their scheduler calls them running."""
    engine = make_engine(policy="merge", max_tokens=64)
    for number, adapter in enumerate((1, 2, 2, 1)):
        engine.add_request(make_request(f"r{number}", [4] * 5, adapter, 9, ignore_eos=True))
    seen = set()
    for _ in range(12):
        step(engine, {})
        stats, detail = engine.stats(), engine.detail()
        assert stats.num_running == sum(detail.running.values()) and stats.num_waiting == sum(detail.waiting.values())
        assert stats.num_running + stats.num_waiting == len(engine.requests)
        seen.add((frozenset(detail.running), frozenset(detail.waiting)))
    assert (frozenset({"hash0"}), frozenset({"hash1"})) in seen


def test_what_was_not_submitted_leaves_no_prefix() -> None:
    engine = make_engine()
    submit = engine.executor.submit
    engine.executor.submit = lambda batch: 1 / 0  # type: ignore[method-assign,assignment]
    engine.add_request(make_request("r", list(range(20, 40)), 1))
    with pytest.raises(ZeroDivisionError):
        step(engine, {})
    engine.executor.submit = submit  # type: ignore[method-assign]
    engine.abort(["r"])
    engine.executor.states.clear()  # type: ignore[attr-defined]
    again = make_request("again", list(range(20, 40)), 1)
    engine.add_request(again)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert got["again"][-1].num_cached_tokens == 0
    assert tokens_of(got["again"]) == expected(again)


@pytest.mark.parametrize("policy", ["fcfs", "credit", "merge"])
def test_a_generating_request_gets_its_adapter_back(policy: str) -> None:
    """One slot, and a steady stream for another adapter that took it: every bound the turn changes."""
    engine = make_engine(num_slots=1, policy=policy)
    patient = make_request("patient", [7] * 4, 2, 20, ignore_eos=True)
    engine.add_request(patient)
    got: dict[str, list[SequenceProgress]] = {}
    now = 0.0
    while not patient.is_finished and now < 200:
        stream = make_request(f"s{now}", [5] * 4, 1, 3, ignore_eos=True)
        stream.arrival_time = now
        engine.add_request(stream)
        step(engine, got, now)
        now += 1.0
    assert patient.is_finished
    assert tokens_of(got["patient"]) == expected(patient)


def test_every_step_is_told_to_the_decision_log() -> None:
    decisions: list[Decision] = []
    engine = make_engine(policy="merge")
    engine.on_decision = decisions.append
    for i in range(3):
        engine.add_request(make_request(f"r{i}", [i + 1] * 5, 1 + i % 2, 4, ignore_eos=True))
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert [d.step for d in decisions] == list(range(len(decisions)))
    assert {d.merged_adapter for d in decisions} == {"hash0", "hash1"}
    assert all(set(d.scheduled) == {d.merged_adapter} for d in decisions)
    assert decisions[0].passed_over == {"hash1": 1} and decisions[0].switch_seconds > 0


def test_a_decision_tells_the_credits_that_are_furthest_from_zero() -> None:
    decisions: list[Decision] = []
    engine = make_engine(policy="credit")
    engine.on_decision = decisions.append
    policy = engine.scheduler.policy
    assert isinstance(policy, CreditPolicy)
    policy.ledger.move("debtor", "creditor", 0.25)
    engine.add_request(make_request("r0", [1] * 5, 1, 4, ignore_eos=True))
    step(engine, {})
    assert decisions[-1].credits == {"debtor": -0.25, "creditor": 0.25, "hash0": 0.0} == policy.credits
    for i in range(100):
        policy.ledger.move(f"payer{i}", f"payee{i}", 1.0 + i)
    step(engine, {})
    told = decisions[-1].credits
    assert len(told) == MAX_CREDITS
    assert {abs(credit) for credit in told.values()} == {1.0 + i for i in range(100 - MAX_CREDITS // 2, 100)}


def test_twins_in_one_step_share_blocks() -> None:
    engine = make_engine(max_tokens=64)
    for i in range(3):
        engine.add_request(make_request(f"r{i}", list(range(1, 34)), 1))
    got: dict[str, list[SequenceProgress]] = {}
    step(engine, got)
    drain(engine, got)
    assert [got[f"r{i}"][0].num_cached_tokens for i in range(3)] == [0, 32, 32]
    assert all(tokens_of(got[f"r{i}"]) == expected(make_request("x", list(range(1, 34)), 1)) for i in range(3))
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_stops(depth: int) -> None:
    engine = make_engine(depth=depth)
    reference = expected(make_request("x", [5, 6, 7], max_tokens=20, ignore_eos=True))
    stop = reference[4]
    cases = {
        "stop id": make_request("stop id", [5, 6, 7], max_tokens=20, ignore_eos=True, stop_token_ids=(stop,)),
        "late": make_request("late", [5, 6, 7], max_tokens=20, ignore_eos=True, stop_token_ids=(stop,), min_tokens=9),
        "length": make_request("length", [5, 6, 7], max_tokens=2, ignore_eos=True),
        "nothing": make_request("nothing", [5, 6, 7], max_tokens=0),
    }
    for request in cases.values():
        engine.add_request(request)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    first = reference.index(stop) + 1
    assert tokens_of(got["stop id"]) == reference[:first]
    assert (got["stop id"][-1].finish_reason, got["stop id"][-1].stop_reason) == ("stop", stop)
    assert len(tokens_of(got["late"])) >= 9
    assert (tokens_of(got["length"]), got["length"][-1].finish_reason) == (reference[:2], "length")
    assert (tokens_of(got["nothing"]), got["nothing"][-1].finish_reason) == ([], "length")
    assert_empty(engine)


def test_model_length_ends_a_request() -> None:
    engine = make_engine(max_len=20)
    engine.add_request(make_request("r", [3] * 15, max_tokens=100, ignore_eos=True))
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert len(tokens_of(got["r"])) == 5
    assert got["r"][-1].finish_reason == "length"


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_blocks", [16, 64])
def test_prompt_scores_come_whole_and_once(depth: int, num_blocks: int) -> None:
    engine = make_engine(num_blocks=num_blocks, depth=depth, max_tokens=7)
    requests = [make_request(f"r{i}", [i + 1] * 21, 0, 25, prompt_logprobs=0, ignore_eos=True) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    for request in requests:
        scores = got[request.request_id][0].prompt_logprobs
        assert scores is not None
        assert [next(iter(score.values())).logprob for score in scores] == [-float(p) for p in range(1, 21)]
        assert all(item.prompt_logprobs is None for item in got[request.request_id][1:])


@pytest.mark.parametrize("depth", [0, 1])
def test_one_failing_sequence_fails_alone_and_leaves_no_prefix(depth: int) -> None:
    engine = make_engine(depth=depth)
    good, bad = make_request("good", list(range(1, 12)), 1), make_request("bad", list(range(20, 40)), 1)
    engine.executor.poisoned.add("bad")  # type: ignore[attr-defined]
    engine.add_request(good)
    engine.add_request(bad)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert tokens_of(got["good"]) == expected(good)
    assert got["bad"][-1].finish_reason == "error" and got["bad"][-1].error
    again = make_request("again", list(range(20, 40)), 1)
    engine.add_request(again)
    drain(engine, got)
    assert got["again"][-1].num_cached_tokens == 0
    assert tokens_of(got["again"]) == expected(again)
    assert_empty(engine)


def test_a_failure_that_comes_after_an_abort_or_a_preemption_leaves_no_prefix() -> None:
    for interrupt in ("abort", "preempt"):
        engine = make_engine(depth=1)
        bad = make_request("bad", list(range(20, 40)), 1)
        engine.executor.poisoned.add("bad")  # type: ignore[attr-defined]
        engine.add_request(bad)
        got: dict[str, list[SequenceProgress]] = {}
        engine.scheduler.limits = replace(engine.scheduler.limits, max_num_batched_tokens=64)
        step(engine, got)  # In flight, and its blocks are named.
        if interrupt == "abort":
            engine.abort(["bad"])
        else:
            engine.scheduler.preempt(bad)
        drain(engine, got)
        engine.add_request(make_request("again", list(range(20, 40)), 1))
        drain(engine, got)
        assert got["again"][-1].num_cached_tokens == 0, interrupt
        assert_empty(engine)


def test_more_adapters_than_slots_take_turns() -> None:
    engine = make_engine(num_slots=1)
    requests = [make_request(f"r{i}", [i + 1] * 5, 1 + i % 4) for i in range(8)]
    for request in requests:
        engine.add_request(request)
    got: dict[str, list[SequenceProgress]] = {}
    drain(engine, got)
    assert [tokens_of(got[r.request_id]) for r in requests] == [expected(r) for r in requests]
    assert engine.executor.num_loads >= 4  # type: ignore[attr-defined]


def test_forgotten_adapter_serves_out_its_requests_then_leaves_the_device() -> None:
    engine = make_engine()
    spec = ADAPTERS[1]
    assert spec is not None
    request = make_request("r", [4] * 9, 1)
    engine.add_request(request)
    got: dict[str, list[SequenceProgress]] = {}
    step(engine, got)
    engine.forget_adapter(spec.content_hash)
    assert spec.content_hash in engine.scheduler.adapters.resident
    with pytest.raises(ValueError, match="not registered"):
        engine.add_request(make_request("late", [4], 1))
    drain(engine, got)
    assert tokens_of(got["r"]) == expected(request)
    assert spec.content_hash not in engine.scheduler.adapters.resident
    assert engine.executor.slots == {}  # type: ignore[attr-defined]
    assert engine.executor.discarded == [spec.content_hash]  # type: ignore[attr-defined]


def test_an_adapter_registered_again_in_time_stays() -> None:
    engine = make_engine()
    spec = ADAPTERS[1]
    assert spec is not None
    engine.add_request(make_request("r", [4] * 9, 1))
    got: dict[str, list[SequenceProgress]] = {}
    step(engine, got)
    engine.forget_adapter(spec.content_hash)
    engine.register_adapter(spec)
    drain(engine, got)
    assert spec.content_hash in engine.scheduler.adapters.resident
    assert engine.executor.discarded == []  # type: ignore[attr-defined]


def test_an_id_can_be_used_again_while_its_old_batch_is_in_flight() -> None:
    engine = make_engine(depth=1)
    engine.add_request(make_request("r", [9] * 6, 2, 8))
    got: dict[str, list[SequenceProgress]] = {}
    step(engine, got)
    engine.abort(["r"])
    again = make_request("r", [8] * 5, 3, 8)
    engine.add_request(again)
    drain(engine, got)
    assert tokens_of(got["r"]) == expected(again)
    assert_empty(engine)


def test_a_thousand_requests_leave_nothing_behind() -> None:
    engine = make_engine(num_blocks=48, host=16, depth=1, max_seqs=16, max_tokens=64)
    for i in range(1000):
        engine.add_request(make_request(f"r{i}", [1 + i % 7] * (1 + i % 29), i % 5, 1 + i % 9))
    got: dict[str, list[SequenceProgress]] = {}
    while engine.has_work:
        for progress in engine.step(0.0):
            got.setdefault(progress.request_id, []).append(progress)
            if progress.request_id.endswith("13") and not progress.finish_reason:
                engine.abort([progress.request_id])
    assert len(got) == 1000
    assert_empty(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_how_long_a_request_waited_for_its_first_step_is_told_with_its_tokens(depth: int) -> None:
    engine = make_engine(max_seqs=1, depth=depth)
    found: dict[str, list[SequenceProgress]] = {}
    first, second = make_request("first", [5, 6], 0, 3, ignore_eos=True), make_request("second", [7], 0, 2)
    second.arrival_time = 0.5
    engine.add_request(first)
    step(engine, found, now=2.0)
    engine.add_request(second)
    never = make_request("never", [8], 0, 2)
    engine.add_request(never)
    step(engine, found, now=3.0)
    engine.abort(["never"])
    drain(engine, found, now=10.0)
    assert {progress.queue_seconds for progress in found["first"]} == {2.0}
    waited = {progress.queue_seconds for progress in found["second"]}
    assert len(waited) == 1 and waited.pop() >= 9.5
    assert never.queue_seconds is None
