"""Tokens that are taken in together leave the same tables as tokens that are taken in one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peft_dist.core.errors import EngineDeadError
from peft_dist.core.messages import ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.equal_steps import EqualSteps
from peft_dist.orchestrator.records import Replica, RequestRecord
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.policy.dispatch import Estimates, Target, Work

TOKEN = 1


def table(expected: list[float]) -> tuple[RequestTable, list[RequestRecord]]:
    """A replica's requests, each of which has drawn its first token."""
    requests, records = RequestTable(), []
    for number, tokens in enumerate(expected):
        record = RequestRecord(f"r{number}", [0] * 5, SamplingParams(max_tokens=1000), 0, None, 0.0)
        requests.open(record, 0.0)
        requests.place(record, 0, tokens)
        requests.advance(record, record.unfinished[0], [TOKEN])
        records.append(record)
    return requests, records


@given(
    st.lists(st.floats(0.5, 60.0), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 25), st.booleans()), min_size=1, max_size=6),
)
def test_the_tables_are_the_same(expected: list[float], parts: list[tuple[int, bool]]) -> None:
    singly, theirs = table(expected)
    at_once, ours = table(expected)
    told: dict[str, list[float]] = {record.request_id: [] for record in ours}
    steps = EqualSteps(at_once, Replica(0, 1), TOKEN, lambda record, times: told[record.request_id].extend(times))
    ids, now = [f"r{i}-0" for i in range(len(expected))], 0.0
    for count, settles in parts:
        times = [now + i for i in range(count)]
        now += count
        steps.set_members(ids)
        steps.take_in(times, times[-1])
        for _ in range(count):
            for record in theirs:
                singly.advance(record, record.unfinished[0], [TOKEN])
        assert at_once.backlog(0) == singly.backlog(0)
        if settles:
            steps.settle()
            assert ours == theirs
    steps.settle()
    assert ours == theirs
    assert all(times == [float(i) for i in range(int(now))] for times in told.values())


@given(
    st.lists(st.floats(0.5, 60.0), min_size=2, max_size=6),
    st.lists(st.tuples(st.integers(1, 25), st.sets(st.integers(0, 5), min_size=1)), min_size=1, max_size=8),
)
def test_so_they_are_while_some_come_and_go(expected: list[float], parts: list[tuple[int, set[int]]]) -> None:
    singly, theirs = table(expected)
    at_once, ours = table(expected)
    steps = EqualSteps(at_once, Replica(0, 1), TOKEN)
    for count, chosen in parts:
        some = sorted(i for i in chosen if i < len(expected))
        steps.set_members([f"r{i}-0" for i in some])
        steps.take_in([0.0] * count, 0.0)
        for _ in range(count):
            for i in some:
                singly.advance(theirs[i], theirs[i].unfinished[0], [TOKEN])
        assert at_once.backlog(0) == singly.backlog(0)
        left = [record for i, record in enumerate(ours) if i not in some]
        assert left == [record for i, record in enumerate(theirs) if i not in some]
    steps.leave(f"r{i}-0" for i in range(len(expected)))
    assert ours == theirs


def test_what_has_no_owner_any_more_is_passed_over() -> None:
    requests, [kept, gone] = table([10.0, 10.0])
    requests.close(gone, gone.unfinished[0])
    replica = Replica(0, 1)
    steps = EqualSteps(requests, replica, TOKEN)
    steps.set_members(["r0-0", "r1-0"])
    steps.take_in([1.0, 2.0, 2.5], 2.5, num_taken=7)
    steps.settle(ReplicaStats(num_free_blocks=7, resident_adapters=["a"]))
    assert kept.unfinished[0].output_token_ids == [TOKEN] * 4 and not gone.unfinished
    assert replica.stats.num_free_blocks == 7 and replica.resident == {"a"}
    assert (replica.last_heard, replica.num_taken) == (2.5, 7)


def test_whoever_is_late_is_asked_before_tokens_count() -> None:
    requests, _ = table([10.0, 10.0])
    asked: list[int] = []
    EqualSteps(requests, Replica(0, 1), TOKEN, refresh=lambda: asked.append(0))
    assert requests.backlog(0).refresh is not None
    estimates = Estimates(Work(1, 5, 10.0))
    for max_num_seqs, times in ((4, 0), (1, 1)):
        estimates.finish_seconds(Target(0, StepCosts(), requests.backlog(0), frozenset(), max_num_seqs, 1000))
        assert len(asked) == times


def test_a_renewed_replica_has_what_it_had_on_its_device() -> None:
    replicas = ReplicaTable()
    lost = replicas.add(0, None)
    lost.tell(ReplicaStats(resident_adapters=["a"]))
    replicas.mark_dead(lost, EngineDeadError("its link failed"))
    renewed = replicas.renew(lost, start_deadline=1.0)
    assert renewed.resident == {"a"} == set(renewed.stats.resident_adapters)
    renewed.tell(ReplicaStats(resident_adapters=["a"]))
    assert renewed.resident == {"a"} and not replicas.ready()
