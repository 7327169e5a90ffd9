"""Tokens that are taken in together leave the same tables as tokens that are taken in one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peft_dist.core.messages import ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.equal_steps import EqualSteps
from peft_dist.orchestrator.records import Replica, RequestRecord
from peft_dist.orchestrator.requests import RequestTable

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
    steps = EqualSteps(at_once, Replica(0, 1), [f"r{i}-0" for i in range(len(expected))], TOKEN)
    for count, settles in parts:
        steps.take_in(count)
        for _ in range(count):
            for record in theirs:
                singly.advance(record, record.unfinished[0], [TOKEN])
        assert at_once.backlog(0) == singly.backlog(0)
        if settles:
            steps.settle()
            assert ours == theirs
    steps.settle()
    assert ours == theirs


def test_what_has_no_owner_any_more_is_passed_over() -> None:
    requests, [kept, gone] = table([10.0, 10.0])
    requests.close(gone, gone.unfinished[0])
    replica = Replica(0, 1)
    steps = EqualSteps(requests, replica, ["r0-0", "r1-0"], TOKEN)
    assert steps.request_ids == ["r0"]
    steps.take_in(3)
    steps.settle(ReplicaStats(num_free_blocks=7), 2.5)
    assert kept.unfinished[0].output_token_ids == [TOKEN] * 4
    assert replica.stats.num_free_blocks == 7 and replica.last_heard == 2.5
