"""Sequences that have ended and are not read take room in the queue."""

from __future__ import annotations

import pytest

from peft_dist.core.errors import InvalidRequestError, QueueFullError
from peft_dist.core.messages import Progress, Ready, ReplicaStats, encode_command
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from tests.worker.fake_replica import fake_model


def test_what_is_not_read_takes_room() -> None:
    core = Orchestrator(OrchestratorOptions(max_num_seqs=2, max_queue=1))
    epoch = core.add_replica(0, 0.0).epoch
    core.observe(0, epoch, Ready(model=fake_model(), pid=1), 0.0)
    core.room.keep_unread(2)
    core.submit(NewRequest("a", [5], SamplingParams(max_tokens=9)), 0.0)
    with pytest.raises(QueueFullError, match="3 of 3 sequences wait, run or are not read"):
        core.submit(NewRequest("b", [5], SamplingParams(max_tokens=9)), 0.0)
    core.room.keep_unread(-1)
    core.submit(NewRequest("b", [5], SamplingParams(max_tokens=9)), 0.0)
    assert core.room.num_unread == 1 and core.room.num_held == 3


def test_requests_that_come_together_are_counted_together() -> None:
    core = Orchestrator(OrchestratorOptions(max_num_seqs=2, max_queue=2))
    epoch = core.add_replica(0, 0.0).epoch
    core.observe(0, epoch, Ready(model=fake_model(), pid=1), 0.0)
    core.room.check_count(4, "prompt")
    with pytest.raises(InvalidRequestError, match="prompt asks for 5 sequences, more than the 4") as caught:
        core.room.check_count(5, "prompt")
    assert caught.value.param == "prompt"
    core.submit(NewRequest("a", [5], SamplingParams(max_tokens=9)), 0.0)
    with pytest.raises(QueueFullError, match="1 of 4 sequences"):
        core.room.check_count(4, "prompt")


def test_what_a_replica_does_not_take_in_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dist.orchestrator.room.UNTAKEN_BYTES", 100_100)
    core = Orchestrator(OrchestratorOptions(max_num_seqs=10, max_queue=1000))
    epoch = core.add_replica(0, 0.0).epoch
    core.observe(0, epoch, Ready(model=fake_model(), pid=1), 0.0)
    number = 0

    def give_up_on(params: SamplingParams, num_tokens: int = 400) -> int:
        """Bytes that are queued for the replica by a client that asks, and goes away."""
        nonlocal number
        out = core.submit(NewRequest(f"r{number}", [999] * num_tokens, params), 0.0)
        out += core.abort(f"r{number}", 0.0)
        number += 1
        return sum(len(encode_command(one.command, one.epoch, 1)) for one in out)

    def fill(params: SamplingParams) -> int:
        queued = 0
        with pytest.raises(QueueFullError, match="have not taken in"):
            while True:
                queued += give_up_on(params)
        return queued

    two = SamplingParams(n=2, max_tokens=9)
    assert 50_000 < fill(two) < 100_100 and number == 25, "far fewer sequences than there is room for"
    # For a short one there is some.
    give_up_on(two, 1)
    core.observe(0, epoch, Progress(sequences=[], stats=ReplicaStats(), num_taken=30), 0.0)
    fill(two)
    assert number == 25 + 1 + 15
    core.observe(0, epoch, Progress(sequences=[], stats=ReplicaStats()), 0.0)
    assert not core.room.untaken_bytes
    # Tokens are not all that can be long.
    long = SamplingParams(max_tokens=9, logit_bias=dict.fromkeys(range(900), 1.5), stop_token_ids=list(range(900)))
    assert 50_000 < fill(long) < 100_100
    # One that is larger than all that may wait is none too large where nothing does.
    core.observe(0, epoch, Progress(sequences=[], stats=ReplicaStats()), 0.0)
    monkeypatch.setattr("peft_dist.orchestrator.room.UNTAKEN_BYTES", 1000)
    give_up_on(two)


def test_what_a_dead_replica_did_not_take_in_is_gone_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dist.orchestrator.room.UNTAKEN_BYTES", 3000)
    core = Orchestrator(OrchestratorOptions(max_num_seqs=10, max_queue=1000))
    epochs = [core.add_replica(replica_id, 0.0).epoch for replica_id in (0, 1)]
    for replica_id, epoch in enumerate(epochs):
        core.observe(replica_id, epoch, Ready(model=fake_model(), pid=1), 0.0)
    [add] = core.submit(NewRequest("a", [5] * 400, SamplingParams(max_tokens=9)), 0.0)
    core.abort("a", 0.0)
    with pytest.raises(QueueFullError):
        core.submit(NewRequest("b", [5] * 400, SamplingParams(max_tokens=9)), 0.0)
    core.lose_replica(add.replica_id, add.epoch, "it is silent", 1.0)
    core.submit(NewRequest("b", [5] * 400, SamplingParams(max_tokens=9)), 2.0)
