"""What is kept from step to step is what would be made anew."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.request import Request, RequestStatus
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.candidates import Candidates
from peft_dist.engine.detail_schedule import BUSY_SECONDS, DetailSchedule
from peft_dist.engine.limits import SchedulerLimits
from tests.engine.test_engine import make_engine, make_request, step

SPECS = [AdapterSpec(f"a{i}", f"hash {i}", "", {"q": 4}, 10) for i in range(6)]
LIMITS = SchedulerLimits(1000, 8, 64)


def request_of(name: str, adapter: int | None, time: float = 0.0) -> Request:
    spec = None if adapter is None else SPECS[adapter]
    return Request(name, [1] * 5, SamplingParams(max_tokens=9), 0, time, spec)


def manager(num_slots: int = 4) -> AdapterManager:
    found = AdapterManager(num_slots)
    found.want(SPECS[:num_slots])
    for key in found.loading:
        found.loaded(key)
    return found


def loads(adapters: AdapterManager, number: int) -> list[str]:
    """What is on the device once this one was wanted and has come: somebody else left for it."""
    adapters.want([SPECS[number]])
    for key in adapters.loading:
        adapters.loaded(key)
    adapters.check()
    return adapters.resident


steps = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=6),
    st.integers(0, 5),
)


@given(st.lists(steps, max_size=12))
def test_who_was_used_last_leaves_last_however_late_it_is_noted(script: list[list[int | None] | int]) -> None:
    at_once, late = manager(), manager()
    for number, entry in enumerate(script):
        if isinstance(entry, int):
            assert loads(at_once, entry) == loads(late, entry)
            continue
        requests = [request_of(f"r{number}-{i}", adapter) for i, adapter in enumerate(entry)]
        late.touch(requests)
        for request in requests:
            if request.adapter is not None:
                slot = at_once.acquire(request.adapter)
                assert (slot is None) == (request.adapter.content_hash not in late.on_device)
                if slot is not None:
                    at_once.release(request.adapter)
    for number in range(6):
        assert loads(at_once, number) == loads(late, number)


@given(st.lists(st.tuples(st.sampled_from(["add", "forget", "begin", "load"]), st.integers(0, 5)), max_size=20))
def test_candidates_are_those_of_the_queue(script: list[tuple[str, int]]) -> None:
    adapters, kept, queue = manager(), Candidates(LIMITS), dict[str, Request]()
    for number, (kind, which) in enumerate(script):
        chosen = list(queue.values())[which] if which < len(queue) else None
        if kind == "add":
            request = queue[f"r{number}"] = request_of(f"r{number}", which, float(number))
            kept.add(request, adapters)
        elif kind == "forget" and chosen is not None:
            del queue[chosen.request_id]
            kept.forget(chosen.request_id)
        elif kind == "begin" and chosen is not None and chosen.content_hash in adapters.on_device:
            chosen.status, chosen.num_computed_tokens = RequestStatus.RUNNING, len(chosen.prompt_token_ids)
            chosen.output_token_ids.append(1)
            kept.decode([chosen.request_id] if not chosen.output_token_ids[1:] else [])
            chosen.num_computed_tokens += len(chosen.output_token_ids) - 1
        elif kind == "load":
            loads(adapters, which)
        found = kept.of(queue.values(), adapters)
        assert found == Candidates(LIMITS).of(queue.values(), adapters)
        assert found is kept.of(queue.values(), adapters)


events = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 20), st.integers(0, 4), st.integers(1, 9), st.booleans()),
    st.tuples(st.sampled_from(["abort", "preempt"]), st.integers(0, 5)),
    st.integers(1, 4),
)


@given(st.lists(events, max_size=16), st.integers(0, 2), st.sampled_from(["credit", "fcfs", "merge"]))
def test_so_they_are_while_an_engine_steps(script: list[tuple[Any, ...] | int], depth: int, policy: str) -> None:
    engine = make_engine(num_blocks=18, depth=depth, max_seqs=4, max_len=24, policy=policy)
    scheduler, got = engine.scheduler, dict[str, list[SequenceProgress]]()
    for number, event in enumerate([*script, 40]):
        running = [one for one in scheduler.queue.values() if one.status is RequestStatus.RUNNING]
        match event:
            case ("add", num_tokens, adapter, max_tokens, ignore_eos):
                prompt = [1 + (number + i) % 7 for i in range(num_tokens)]
                request = make_request(f"r{number}", prompt, adapter, max_tokens, ignore_eos=ignore_eos)
                engine.add_request(request)
            case ("abort", which):
                engine.abort(list(engine.requests)[which : which + 1])
            case ("preempt", which) if which < len(running):
                scheduler.preempt(running[which])
        for index in range(1 + (event if isinstance(event, int) else 1)):
            if index:
                step(engine, got)
            queue, adapters = scheduler.queue, scheduler.adapters
            kept, fresh = (
                one.of(queue.values(), adapters) for one in (scheduler._candidates, Candidates(scheduler.limits))
            )
            assert kept == fresh
            if scheduler._candidates.are_here(adapters):
                assert all(candidate.is_resident for candidate in fresh)
    assert not engine.requests


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=40))
def test_details_that_are_passed_by_are_due_again_as_if_they_had_been_told(gaps: list[float]) -> None:
    starts, now = [], 0.0
    for gap in gaps:
        now += gap
        starts.append(now)
    told, passed = DetailSchedule(), DetailSchedule()
    for schedule in (told, passed):
        schedule.note(stepped=True, is_idle=False, version=0)
        schedule.sent(0.0)
        schedule.note(stepped=True, is_idle=False, version=0)
    due = [start for start in starts if told.is_due(start) and told.sent(start) is None]
    assert passed.pass_by(starts) is bool(due)
    assert passed.due_at == told.due_at == (due[-1] if due else 0.0) + BUSY_SECONDS
