"""Copies of KV: those that a request stands still for wait for no others, and none is made that nobody wants."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from peft_dist.engine.executor import TransferOutcome
from peft_dist.kernels.kv_copy import KVCopier
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.runner.kv_transfers import KVTransfers


class Gate:
    """Holds up the copies of pools' blocks that begin with this block, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.read: list[list[int]] = []
        read = KVCopier.read

        def held_up(copier: KVCopier, blocks: Sequence[int], out: torch.Tensor, *, on_host: bool = False) -> None:
            self.read.append(list(blocks))
            if blocks[0] == block:
                self.reached.set()
                assert self.opened.wait(60)
            read(copier, blocks, out, on_host=on_host)

        monkeypatch.setattr(KVCopier, "read", held_up)


@pytest.fixture
def transfers() -> Iterator[KVTransfers]:
    made = KVTransfers(KVCachePool([(2, 4), (1, 8)], 12, 3, torch.float32, "cpu", 4))
    yield made
    made.close()


def outcomes(transfers: KVTransfers, number: int) -> list[TransferOutcome]:
    found: list[TransferOutcome] = []
    while len(found) < number:
        assert select.select([transfers.fileno()], [], [], 60)[0], "no copy ended"
        found += transfers.take()
    return found


def test_the_rest_of_a_request_that_stands_still_waits_for_no_copies_ahead(
    transfers: KVTransfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, 0)
    transfers.start_export(1, [0, 1, 2], on_host=False, ahead=True)
    transfers.start_export(2, [3, 4], on_host=False, ahead=True)
    assert gate.reached.wait(60)
    transfers.start_export(3, [5], on_host=False)
    [rest] = outcomes(transfers, 1)
    assert rest.key == 3 and rest.kv is not None
    # Nor does what comes in.
    transfers.start_import(4, rest.kv, [6])
    assert [(one.key, one.error) for one in outcomes(transfers, 1)] == [(4, None)]
    gate.opened.set()
    assert [one.key for one in outcomes(transfers, 2)] == [1, 2]


def test_what_is_ended_while_it_waits_for_its_turn_is_not_copied(
    transfers: KVTransfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, 0)
    transfers.start_export(1, [0], on_host=False, ahead=True)
    transfers.start_export(2, [3, 4], on_host=False, ahead=True)
    transfers.start_export(3, [5], on_host=False, ahead=True)
    assert gate.reached.wait(60)
    transfers.end_export(2)
    gate.opened.set()
    found = {one.key: one for one in outcomes(transfers, 3)}
    assert gate.read == [[0], [5]]
    assert found[2].kv is None and found[1].kv is not None and found[3].kv is not None
