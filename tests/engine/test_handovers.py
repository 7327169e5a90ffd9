"""Requests that go from one engine to another with their KV, on a fake device that reads through block tables."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import Exported, Imported, SequenceProgress
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.engine import Engine
from peft_dist.engine.handovers import Handovers
from tests.engine.test_engine import assert_empty, expected, make_engine, make_request, prompts, step, tokens_of


class Side:
    """An engine and its handovers, and what it told."""

    def __init__(self, memory: dict[str, object], ahead: int = 16, **options: object) -> None:
        self.engine: Engine = make_engine(**options)  # type: ignore[arg-type]
        self.engine.executor.memory = memory  # type: ignore[attr-defined]
        self.handovers = Handovers(self.engine, ahead)
        self.progress: dict[str, list[SequenceProgress]] = {}
        self.reports: list[Exported | Imported] = []
        self.now = 0.0

    def round(self) -> None:
        """What a worker does between two looks at its commands."""
        self.reports += self.handovers.poll()
        self.now += 0.02
        if self.engine.has_work:
            step(self.engine, self.progress, self.now)
        self.handovers.check()

    def told(self, kind: type[Exported] | type[Imported]) -> Exported | Imported | None:
        found = [report for report in self.reports if isinstance(report, kind)]
        self.reports = [report for report in self.reports if not isinstance(report, kind)]
        return found[0] if found else None

    def drain(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                return
            self.round()
        raise AssertionError("the engine does not come to an end")

    def drawn(self, request_id: str) -> list[int]:
        return tokens_of(self.progress.get(request_id, []))


def sides(depth: int = 0, delay: int = 0, **options: object) -> tuple[Side, Side]:
    memory: dict[str, object] = {}
    pair = Side(memory, depth=depth, **options), Side(memory, depth=depth, **options)
    for side in pair:
        side.engine.executor.copy_delay = delay  # type: ignore[attr-defined]
    return pair


def export(source: Side, ids: list[str], number: int = 1) -> Exported:
    source.handovers.export(number, ids)
    for _ in range(40):
        source.round()
        if (report := source.told(Exported)) is not None:
            assert isinstance(report, Exported)
            return report
    raise AssertionError("never exported")


def bring(target: Side, requests: list[Request], states: list[SequenceState], number: int = 1) -> Imported:
    target.handovers.import_requests(number, requests, states)
    for _ in range(20):
        target.round()
        if (report := target.told(Imported)) is not None:
            assert isinstance(report, Imported)
            return report
    raise AssertionError("never imported")


def twin(request: Request, drawn: list[int]) -> Request:
    """What the orchestrator has the other replica run."""
    return Request(
        f"{request.request_id}~1", request.prompt_token_ids, request.params, request.seed,
        request.arrival_time, request.adapter, request.sequence_index, list(drawn),
    )  # fmt: skip


plans = st.lists(st.tuples(prompts, st.integers(0, 4), st.integers(1, 14), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=250, deadline=None)
@given(
    plans=plans,
    steps=st.integers(0, 14),
    depth=st.integers(0, 1),
    delay=st.integers(0, 3),
    host=st.sampled_from([0, 20]),
    num_blocks=st.sampled_from([12, 20, 64]),
    mask=st.integers(1, 31),
    ahead=st.sampled_from([1, 2, 16]),
    fate=st.sampled_from(["moved", "cancelled", "refused", "copy fails", "gone", "aborted"]),
)
def test_every_request_has_the_tokens_it_has_alone(
    plans: list[tuple[list[int], int, int, bool]],
    steps: int,
    depth: int,
    delay: int,
    host: int,
    num_blocks: int,
    mask: int,
    ahead: int,
    fate: str,
) -> None:
    source, target = sides(depth, delay, num_blocks=num_blocks, host=host, max_tokens=16, ahead=ahead)
    requests = {
        f"r{i}": make_request(f"r{i}", prompt, adapter, length, prompt_logprobs=0 if scored else None)
        for i, (prompt, adapter, length, scored) in enumerate(plans)
    }
    for request in requests.values():
        source.engine.add_request(request)
    target.engine.add_request(other := make_request("other", [5, 6, 7], 1, 20))
    for _ in range(steps):
        source.round()
    chosen = [request_id for i, request_id in enumerate(requests) if mask >> i & 1]
    exported = export(source, chosen)
    assert exported.error is None
    states = exported.sequences
    for state in states:
        assert state.num_output_tokens == len(source.drawn(state.request_id)), "tokens are told before"
    twins = [twin(requests[state.request_id], source.drawn(state.request_id)) for state in states]
    if fate == "refused":
        target.engine.scheduler.blocks.allocate("hog", [], num_blocks * 4 - 12)
    if fate == "copy fails":
        target.engine.executor.failing_copies = ["no memory"]  # type: ignore[attr-defined]
    if fate == "gone":
        target.engine.executor.memory = {}  # type: ignore[attr-defined]
    moved = False
    if fate != "cancelled":
        if fate == "aborted":
            target.handovers.import_requests(1, twins, states)
            target.handovers.abort([request.request_id for request in twins])
            answer: Imported | None = None
            while answer is None:
                target.round()
                answer = target.told(Imported)  # type: ignore[assignment]
            assert answer.error is not None or not twins
        else:
            answer = bring(target, twins, states)
        moved = answer.error is None
        if fate == "moved" and num_blocks == 64:
            assert moved
    target.engine.scheduler.blocks.free("hog")
    source.handovers.end_export(1, moved=moved)
    source.drain()
    target.drain()
    for request_id, request in requests.items():
        drawn = source.drawn(request_id)
        if moved and any(state.request_id == request_id for state in states):
            for item in target.progress[f"{request_id}~1"]:
                assert item.first_index == len(drawn)
                drawn += item.token_ids
        assert drawn == expected(request)
    assert target.drawn("other") == expected(other)
    assert not source.engine.executor.memory  # type: ignore[attr-defined]
    for side in (source, target):
        assert_empty(side.engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_nothing_is_computed_again(depth: int) -> None:
    source, target = sides(depth)
    request = make_request("r", [1 + i for i in range(13)], 2, 12, ignore_eos=True)
    source.engine.add_request(request)
    for _ in range(6):
        source.round()
    [state] = export(source, ["r"]).sequences
    assert state.num_computed_tokens == 13 + state.num_output_tokens - 1
    assert bring(target, [twin(request, source.drawn("r"))], [state]).error is None
    # The first step there has one token, and its full blocks can be found by their prefix.
    assert target.engine.executor.max_batch_tokens == 1  # type: ignore[attr-defined]
    target.engine.add_request(late := make_request("late", request.prompt_token_ids, 2, 4, ignore_eos=True))
    source.handovers.end_export(1, moved=True)
    target.drain()
    assert target.engine.scheduler.prefix_hits == 12
    assert target.drawn("late") == expected(late)
    assert source.drawn("r") + [t for p in target.progress["r~1"] for t in p.token_ids] == expected(request)
    assert target.progress["r~1"][0].queue_seconds is not None


def test_a_prompt_moves_half_computed_with_its_scores() -> None:
    source, target = sides(max_tokens=8)
    request = make_request("r", [1 + i for i in range(22)], 0, 3, prompt_logprobs=0, ignore_eos=True)
    source.engine.add_request(request)
    source.round()
    [state] = export(source, ["r"]).sequences
    assert (state.num_output_tokens, state.num_computed_tokens, len(state.prompt_logprobs)) == (0, 8, 8)
    assert bring(target, [twin(request, [])], [state]).error is None
    source.handovers.end_export(1, moved=True)
    target.drain()
    assert target.drawn("r~1") == expected(request)
    scores = target.progress["r~1"][0].prompt_logprobs
    assert scores is not None and [list(each) for each in scores] == [[token] for token in range(2, 23)]


def test_a_swapped_request_is_exported_from_the_host() -> None:
    source, target = sides(num_blocks=10, host=20)
    requests = [make_request(f"r{i}", [9 + i] * 14, 0, 14, ignore_eos=True) for i in range(2)]
    for request in requests:
        source.engine.add_request(request)
    while requests[1].status is not RequestStatus.SWAPPED:
        source.round()
    [state] = export(source, ["r1"]).sequences
    assert state.kv and state.num_computed_tokens
    assert bring(target, [twin(requests[1], source.drawn("r1"))], [state]).error is None
    source.handovers.end_export(1, moved=True)
    source.drain()
    target.drain()
    assert source.drawn("r0") == expected(requests[0])
    assert source.drawn("r1") + [t for p in target.progress["r1~1"] for t in p.token_ids] == expected(requests[1])
    assert_empty(source.engine)


def test_a_held_request_keeps_its_blocks_from_those_who_run() -> None:
    source, _ = sides(num_blocks=10)
    held = make_request("held", [3] * 17, 0, 8, ignore_eos=True)
    source.engine.add_request(held)
    source.round()
    source.round()
    export(source, ["held"])
    source.engine.add_request(make_request("hungry", [4] * 10, 0, 14, ignore_eos=True))
    for _ in range(40):
        source.round()
    assert held.num_preemptions == 0 and len(source.engine.scheduler.blocks.table("held")) >= 5
    source.handovers.end_export(1, moved=False)
    source.drain()
    assert source.drawn("held") == expected(held)


def test_an_engine_that_only_holds_has_no_work() -> None:
    source, _ = sides(1)
    source.engine.add_request(make_request("r", [3] * 5, 0, 30, ignore_eos=True))
    source.round()
    source.handovers.export(1, ["r", "unknown"])
    assert not source.handovers.is_due, "a step is in flight"
    while source.engine.has_work:
        source.round()
    assert source.handovers.is_due or source.told(Exported)
    source.engine.abort(["r"])
    source.handovers.end_export(1, moved=True)
    source.handovers.end_export(1, moved=True)
    assert_empty(source.engine)


def test_blocks_of_an_aborted_import_are_nobodys_before_the_copy_has_ended() -> None:
    source, target = sides(delay=3)
    request = make_request("r", [3] * 15, 0, 8, ignore_eos=True)
    source.engine.add_request(request)
    source.round()
    [state] = export(source, ["r"]).sequences
    target.handovers.import_requests(1, [twin(request, source.drawn("r"))], [state])
    target.round()
    target.handovers.abort(["r~1"])
    assert target.engine.scheduler.blocks.num_free == 60
    while (report := target.told(Imported)) is None:
        if target.engine.executor.copying:  # type: ignore[attr-defined]
            assert target.engine.scheduler.blocks.num_free == 60
        target.round()
    assert report.error == "it was aborted" and not target.engine.executor.copying  # type: ignore[attr-defined]
    assert_empty(target.engine)


def test_who_is_aborted_before_its_first_step_leaves_nothing() -> None:
    source, target = sides()
    request = make_request("r", [3] * 15, 0, 8, ignore_eos=True)
    source.engine.add_request(request)
    source.round()
    [state] = export(source, ["r"]).sequences
    target.handovers.import_requests(1, [twin(request, source.drawn("r"))], [state])
    while not (reports := target.handovers.poll()):
        pass
    assert reports == [Imported(handover=1)] and target.engine.has_work
    target.engine.abort(["r~1"])
    target.engine.add_request(make_request("next", [3] * 3, 0, 1))
    target.drain()
    assert_empty(target.engine)


def test_an_import_waits_for_steps_that_may_still_use_its_blocks() -> None:
    source, target = sides(1)
    request = make_request("r", [3] * 15, 0, 8, ignore_eos=True)
    source.engine.add_request(request)
    source.round()
    [state] = export(source, ["r"]).sequences
    target.engine.add_request(make_request("gone", [7] * 12, 0, 30, ignore_eos=True))
    target.round()
    target.engine.abort(["gone"])
    target.handovers.import_requests(1, [twin(request, source.drawn("r"))], [state])
    assert not target.handovers.is_due and not target.handovers.poll()
    assert not target.engine.executor.copying  # type: ignore[attr-defined]
    target.round()
    assert target.handovers.is_due


def test_ids_in_use_and_adapters_that_are_gone_are_refused() -> None:
    source, target = sides()
    request = make_request("r", [3] * 15, 1, 8, ignore_eos=True)
    source.engine.add_request(request)
    source.round()
    [state] = export(source, ["r"]).sequences
    moving = twin(request, source.drawn("r"))
    target.engine.add_request(make_request("r~1", [5], 0, 2))
    assert "in use" in str(bring(target, [moving], [state]).error)
    target.drain()
    target.engine.forget_adapter("hash0")
    assert "not registered" in str(bring(target, [moving], [state], 2).error)
    assert "in use" in str(bring(target, [moving, moving], [state, state], 3).error)
    odd = SequenceState("r", state.num_output_tokens, state.num_computed_tokens + 9, kv=state.kv)
    assert "not those that were exported" in str(bring(target, [moving], [odd], 4).error)
    assert_empty(target.engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_full_blocks_are_copied_while_the_request_runs(depth: int) -> None:
    source, target = sides(depth, delay=5, ahead=2)
    request = make_request("r", [1 + i for i in range(13)], 0, 30, ignore_eos=True)
    source.engine.add_request(request)
    for _ in range(4):
        source.round()
    before = len(request.output_token_ids)
    source.handovers.export(1, ["r"])
    while "r" in source.engine.scheduler.queue:
        source.round()
    assert len(request.output_token_ids) >= before + 4, "it ran meanwhile"
    while (report := source.told(Exported)) is None:
        source.round()
    assert isinstance(report, Exported)
    [state] = report.sequences
    first, rest = state.kv
    assert first.num_blocks >= 3 and rest.num_blocks >= 1
    assert first.num_blocks + rest.num_blocks == -(-state.num_computed_tokens // 4)
    assert bring(target, [twin(request, source.drawn("r"))], [state]).error is None
    source.handovers.end_export(1, moved=True)
    target.drain()
    assert source.drawn("r") + [t for p in target.progress["r~1"] for t in p.token_ids] == expected(request)
    assert_empty(source.engine)
    assert_empty(target.engine)


def test_what_was_copied_ahead_is_not_believed_after_a_preemption() -> None:
    source, target = sides(delay=5, ahead=1, num_blocks=10)
    elder = make_request("elder", [9] * 6, 0, 26, ignore_eos=True)
    request = make_request("r", [1 + i for i in range(13)], 0, 12, ignore_eos=True)
    for each in (elder, request):
        source.engine.add_request(each)
    while source.engine.scheduler.blocks.num_free > 1:
        source.round()
    source.handovers.export(1, ["r"])
    while (report := source.told(Exported)) is None:
        source.round()
    assert request.num_preemptions and isinstance(report, Exported)
    answer = bring(target, [twin(request, source.drawn("r"))], report.sequences)
    assert answer.error is None
    source.handovers.end_export(1, moved=True)
    source.drain()
    target.drain()
    assert source.drawn("r") + [t for p in target.progress["r~1"] for t in p.token_ids] == expected(request)
    assert source.drawn("elder") == expected(elder)


def test_an_export_that_is_ended_early_leaves_the_request_running() -> None:
    source, _ = sides(delay=5, ahead=1)
    request = make_request("r", [3] * 15, 0, 30, ignore_eos=True)
    source.engine.add_request(request)
    for _ in range(3):
        source.round()
    source.handovers.export(1, ["r"])
    source.round()
    source.handovers.end_export(1, moved=False)
    source.drain()
    assert source.drawn("r") == expected(request) and source.told(Exported) is None
    assert_empty(source.engine)


def test_what_ends_before_its_blocks_are_copied_ahead_holds_nothing_up() -> None:
    source, _ = sides(1, ahead=1)
    request = make_request("r", [3] * 15, 0, 3, ignore_eos=True)
    source.engine.add_request(request)
    while source.engine.has_work and len(request.output_token_ids) < 2:
        source.round()
    source.handovers.export(1, ["r"])
    source.drain()
    # Nobody would wake a loop for it.
    reports = source.reports + source.handovers.poll()
    assert reports == [Exported(handover=1)] and not source.handovers.is_due


def test_only_what_is_copied_while_its_request_runs_may_wait_for_others() -> None:
    source, _ = sides(ahead=1)
    request = make_request("r", [3] * 15, 0, 30, ignore_eos=True)
    source.engine.add_request(request)
    for _ in range(3):
        source.round()
    [state] = export(source, ["r"]).sequences
    executor = source.engine.executor
    assert len(state.kv) == 2 and executor.ahead == {0}  # type: ignore[attr-defined]
    source.handovers.end_export(1, moved=True)
    assert_empty(source.engine)
