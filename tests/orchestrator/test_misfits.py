"""A replica with another base model than those that serve: it would change answers in the middle, and gets nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peft_dist.core.messages import Fence, Ready
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import ReplicaLost
from peft_dist.orchestrator.records import Outgoing
from tests.orchestrator.world import MODEL

BASE = replace(MODEL, fingerprint="aa")


def ready(core: Orchestrator, replica_id: int, **other: Any) -> list[Outgoing]:
    epoch = core.replicas[replica_id].epoch
    return core.observe(replica_id, epoch, Ready(model=replace(BASE, **other), pid=1), 0.0)


@pytest.fixture
def core() -> Orchestrator:
    made = Orchestrator(OrchestratorOptions(seed=0))
    made.add_replica(0, 0.0)
    ready(made, 0)
    made.drain_events()
    return made


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"fingerprint": "bb"}, "other weights or configuration, bb and aa"),
        ({"vocab_size": 7}, "other vocab_size, 7 and"),
        ({"eos_token_ids": (99,)}, r"other eos_token_ids, \(99,\) and"),
    ],
)
def test_one_that_joins_is_refused_and_told_why(core: Orchestrator, other: dict[str, Any], words: str) -> None:
    guest = core.replicas.join(9.0)
    [out] = ready(core, guest.replica_id, **other)
    assert isinstance(out.command, Fence) and "the same --revision" in out.command.reason
    assert out.command.is_final, "it would come again with the same"
    [lost] = core.drain_events()
    assert isinstance(lost, ReplicaLost)
    with pytest.raises(Exception, match=words):
        raise lost.error
    for number in range(4):
        [add] = core.submit(NewRequest(f"r{number}", [1, 2], SamplingParams(max_tokens=4), None), 0.0)
        assert add.replica_id == 0


def test_what_is_not_known_and_what_may_differ_is_no_reason(core: Orchestrator) -> None:
    guest = core.replicas.join(9.0)
    ready(core, guest.replica_id, fingerprint="", model="/elsewhere", num_blocks=7, device="cuda")
    assert [replica.replica_id for replica in core.replicas.ready()] == [0, guest.replica_id]


def test_one_that_comes_back_with_other_files_is_refused_too(core: Orchestrator) -> None:
    core.submit(NewRequest("r", [1, 2], SamplingParams(max_tokens=4), None), 0.0)
    core.lose_replica(0, core.replicas[0].epoch, "killed", 1.0)
    core.add_replica(0, 2.0)
    ready(core, 0, fingerprint="bb")
    assert not core.replicas.ready()


def test_requests_do_not_wait_for_one_that_was_refused(core: Orchestrator) -> None:
    core.submit(NewRequest("r", [1, 2], SamplingParams(max_tokens=4), None), 0.0)
    guest = core.replicas.join(9.0)
    ready(core, guest.replica_id, fingerprint="bb")
    core.lose_replica(0, core.replicas[0].epoch, "killed", 1.0)
    assert core.num_unfinished == 0
