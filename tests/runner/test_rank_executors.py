"""Where one rank fails and the others do not: all have the outcome of the one."""

from __future__ import annotations

import select
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.handover import KVHandle
from peft_dist.engine.executor import LoadOutcome, TransferOutcome
from peft_dist.runner import rank_messages as messages
from peft_dist.runner.executor import TorchExecutor
from peft_dist.runner.rank_executors import LeadingExecutor
from peft_dist.runner.rank_group import RankGroup, join_ranks

SPEC = AdapterSpec("a", "hash", "", {"m": 4}, 10)


class Meeting(RankGroup):
    """Rank 0 of two, the other of which says what the test wants at the next meeting."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.other: Any = None

    def agree(self, value: Any) -> list[Any]:
        return [value, self.other]


class Weights:
    """Merges anything."""

    current: str | None = None

    def __init__(self) -> None:
        self.reserved: list[set[str]] = []

    def reason_against(self, paths: Iterable[str]) -> str | None:
        return None

    def reserve(self, paths: Iterable[str]) -> str | None:
        self.reserved.append(set(paths))
        return None

    def holds(self, content_hash: str | None) -> bool:
        return False

    def switch(self, content_hash: str | None, weights: object = None) -> None:
        self.current = content_hash


@pytest.fixture
def leader() -> Any:
    dropped: list[int] = []
    pool = SimpleNamespace(device=torch.device("cpu"), drop=dropped.append, dropped=dropped)
    store = SimpleNamespace(pool=pool, weights_in=lambda slot: {})
    model = SimpleNamespace(dtype=torch.float32)
    runner: Any = SimpleNamespace(
        device=torch.device("cpu"), merge=Weights(), store=store, model=model, kv=None, graphs=None
    )
    executor = LeadingExecutor(runner, None, Meeting())
    yield executor
    executor.close()


def test_a_load_that_failed_on_one_rank_failed(leader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [LoadOutcome("hash", 3, None, 1.0)]
    monkeypatch.setattr(leader._loader, "take", lambda: [outcomes.pop()])
    leader._ranks.other = "its disk is gone"
    assert leader.take_loaded() == [LoadOutcome("hash", 3, "its disk is gone", 1.0)]
    assert leader.runner.store.pool.dropped == [3] and leader._slots == {}


def test_what_one_rank_cannot_merge_is_not_merged(leader: Any) -> None:
    leader._ranks.other = "no memory"
    assert leader.prepare_merge(SPEC) == "no memory"
    assert not leader.can_merge(SPEC)
    # Ranks whose merged weights are of other layers would capture other steps, and wait for each other in them.
    assert leader.runner.merge.reserved == []
    leader._ranks.other = None
    assert leader.prepare_merge(SPEC) is None and leader.can_merge(SPEC)
    assert leader.runner.merge.reserved == [{"m"}]


def test_a_switch_that_failed_on_one_rank_leaves_all_at_the_base(leader: Any) -> None:
    leader._slots["hash"] = 0
    assert isinstance(leader.switch(SPEC), float) and leader.merged_adapter() == "hash"
    leader.switch(None)
    leader._ranks.other = "MemoryError: full"
    with pytest.raises(RuntimeError, match="rank 1 could not change its weights: MemoryError: full"):
        leader.switch(SPEC)
    assert leader.merged_adapter() is None


def test_ranks_that_chose_differently_are_refused() -> None:
    ranks = Meeting()
    ranks.other = "host"
    with pytest.raises(ConfigError, match="merge means shadow on rank 0, host on rank 1"):
        ranks.check_alike("merge", "shadow")
    ranks.check_alike("merge", "host")


def test_one_rank_needs_nobody() -> None:
    ranks = join_ranks(EngineConfig(model="m", device="cpu"))
    assert not ranks.is_split and ranks.agree(3) == [3] and ranks.smallest(7) == 7


def test_whatever_changes_a_rank_is_told_to_the_others() -> None:
    """Else ranks would drift apart unseen: a new method of the executor is told, or is known to change nothing."""
    changes_nothing = {
        *("can_merge", "can_host", "merged_adapter", "holds_merged", "residency", "fileno", "captured_for"),
        *("transfers_fileno", "check_device", "peak_memory_bytes", "lacks_captures"),
        # Told where there is something to capture, below.
        "capture_some",
    }
    public = {name for name in vars(TorchExecutor) if not name.startswith("_")}
    assert public - changes_nothing == {name for name in vars(LeadingExecutor) if not name.startswith("_")}


def test_a_step_to_capture_is_told_where_there_is_one(leader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(leader._channel, "tell", told.append)
    captured: list[int] = []
    graphs = SimpleNamespace(lacks_steps=False, gives_up=False, capture_next=lambda: captured.append(1), close=list)
    leader.runner.graphs, leader.runner.store.registered = graphs, {"a": SPEC}
    assert not leader.capture_some() and told == []
    graphs.lacks_steps = True
    assert leader.capture_some() and told == [messages.CaptureNext()] and captured == [1]

    def full() -> None:
        raise torch.OutOfMemoryError("no memory")

    graphs.capture_next = full
    with pytest.raises(torch.OutOfMemoryError):
        leader.capture_some()


def part(token: str, num_bytes: int = 64) -> KVHandle:
    return KVHandle("layout", 2, num_bytes, token, 1, 1)


def test_an_export_has_the_parts_of_all_ranks(leader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [TransferOutcome(5, part("own"), None, 1.0)]
    monkeypatch.setattr(leader.transfers, "take", lambda: [outcomes.pop()])
    leader._ranks.other = TransferOutcome(5, part("other", 32), None, 3.0)
    [outcome] = leader.take_transfers()
    assert outcome.error is None and outcome.seconds == outcome.kv.seconds == 3.0
    assert [outcome.kv.token, *(other.token for other in outcome.kv.others)] == ["own", "other"]
    assert outcome.kv.total_bytes == 96


@pytest.mark.parametrize("own", [part("own"), None])
def test_a_copy_that_failed_on_one_rank_failed(leader: Any, monkeypatch: pytest.MonkeyPatch, own: Any) -> None:
    """Of an export, and of an import, which has nothing to tell of."""
    outcomes = [TransferOutcome(5, own, None, 1.0)]
    monkeypatch.setattr(leader.transfers, "take", lambda: [outcomes.pop()])
    leader._ranks.other = TransferOutcome(5, None, "OSError: no memory", 3.0)
    assert leader.take_transfers() == [TransferOutcome(5, None, "OSError: no memory", 3.0)]


@pytest.mark.parametrize("others", [0, 2])
def test_kv_of_another_number_of_ranks_is_refused(leader: Any, others: int) -> None:
    leader.transfers.rank, leader.transfers.num_ranks = 0, 2
    kv = msgspec.structs.replace(part("own"), others=[part("other")] * others)
    leader.start_import(1, kv, [0, 1])
    select.select([leader.transfers_fileno()], [], [])
    leader._ranks.other = TransferOutcome(1, None, None, 0.0)
    [outcome] = leader.take_transfers()
    assert outcome.error == f"MemoryGoneError: KV of {1 + others} ranks does not fit 2"
