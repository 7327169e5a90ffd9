"""Sequences that have ended and are not read take room in the queue."""

from __future__ import annotations

import pytest

from peft_dist.core.errors import QueueFullError
from peft_dist.core.messages import Ready
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
