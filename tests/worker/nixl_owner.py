"""A process of its own that exports KV blocks and serves them by NIXL. Its pool is made of a seed."""

from __future__ import annotations

import select
from multiprocessing.connection import Connection

import torch

from peft_dist.core.handover import KVHandle
from peft_dist.engine.executor import TransferOutcome
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.runner.kv_transfers import KVTransfers
from peft_dist.worker.kv_server import TcpTransport

NUM_BLOCKS = 300
BLOCKS = list(range(7, NUM_BLOCKS, 2))


def make_pool(seed: int) -> KVCachePool:
    pool = KVCachePool([(8, 64)] * 4, NUM_BLOCKS, 16, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for group in pool.groups():
        group.copy_(torch.randn(group.shape, generator=generator))
    return pool


def outcome(transfers: KVTransfers) -> TransferOutcome:
    """Of the one copy that is under way."""
    ready, _, _ = select.select([transfers.fileno()], [], [], 60)
    assert ready
    [ended] = transfers.take()
    return ended


def serve(orders: Connection, seed: int) -> None:
    """Export ``BLOCKS``, tell where, and end when told to."""
    transfers, transport = KVTransfers(make_pool(seed)), TcpTransport("tcp://127.0.0.1:*", with_nixl=True)
    transfers.transport = transport
    transfers.start_export(1, BLOCKS, on_host=False)
    exported: KVHandle | None = outcome(transfers).kv
    orders.send(exported)
    while orders.recv() == "withdraw":
        transfers.end_export(1)
        orders.send("withdrawn")
    transport.close()
    transfers.close()
